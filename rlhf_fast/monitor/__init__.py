"""The output of a run: metrics, samples, progress, the summary table and ``report.html``."""

from rlhf_fast.monitor.foreign import Log, read_log
from rlhf_fast.monitor.log import RunLog, read_lines
from rlhf_fast.monitor.progress import Progress
from rlhf_fast.monitor.report import write_report
from rlhf_fast.monitor.summary import print_summary, read_summary, write_summary

__all__ = [
    "Log",
    "Progress",
    "RunLog",
    "print_summary",
    "read_lines",
    "read_log",
    "read_summary",
    "write_report",
    "write_summary",
]
