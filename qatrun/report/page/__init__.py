"""The page of a study: records in, one HTML file and its CSV files out.

content.py      what a study is: its records
document.py     the parts of a page; study_page.py and seeds_page.py fill them
figure.py       a figure: two drawings, tables, CSV; svg.py themes what matplotlib drew
scores.py  curves.py  heatmap.py  scales.py  histograms.py  seeds.py  coverage.py    what is shown
render.py       a document as HTML
"""

from qatrun.report.page.content import ArmContent, SeedsContent, StudyContent
from qatrun.report.page.document import Document
from qatrun.report.page.render import render
from qatrun.report.page.seeds_page import seeds_document
from qatrun.report.page.study_page import study_document

__all__ = ["ArmContent", "Document", "SeedsContent", "StudyContent", "render", "seeds_document", "study_document"]
