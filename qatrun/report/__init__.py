"""What a person sees: the live view, tables, and later pages. Reads plain data and draws; decides nothing."""

from qatrun.report.dryrun import dry_run
from qatrun.report.live import TerminalDisplay
from qatrun.report.sizes import readable_size
from qatrun.report.tables import comparison_table, comparison_text, score_table

__all__ = ["TerminalDisplay", "comparison_table", "comparison_text", "dry_run", "readable_size", "score_table"]
