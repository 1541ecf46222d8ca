"""The static HTML report: what was trained, how good it is, and what its features respond to."""

from jaxinterp.report.content import FeaturePage, NeuronMatch, Report, TokenContext
from jaxinterp.report.features import feature_pages
from jaxinterp.report.page import write_report

__all__ = ["FeaturePage", "NeuronMatch", "Report", "TokenContext", "feature_pages", "write_report"]
