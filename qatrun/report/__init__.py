"""What a person sees: the live view, tables and, in `page/`, the page of a study. Draws records; decides nothing."""

from qatrun.report.dryrun import dry_run
from qatrun.report.live import TerminalDisplay
from qatrun.report.tables import comparison_table, comparison_text, score_table

__all__ = ["TerminalDisplay", "comparison_table", "comparison_text", "dry_run", "score_table"]
