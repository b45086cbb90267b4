"""The output of a run: metrics, samples, progress, the summary table and ``report.html``; and the monitor, which says
what goes wrong in it."""

from rlhf_fast.monitor.foreign import Log, read_log
from rlhf_fast.monitor.log import RunLog, read_lines, read_steps
from rlhf_fast.monitor.monitor import Monitor, watch
from rlhf_fast.monitor.progress import Progress
from rlhf_fast.monitor.report import write_report
from rlhf_fast.monitor.summary import print_summary, read_summary, write_summary
from rlhf_fast.monitor.verdict import Verdict, as_json, read_verdicts, write_verdicts

__all__ = [
    "Log",
    "Monitor",
    "Progress",
    "RunLog",
    "Verdict",
    "as_json",
    "print_summary",
    "read_lines",
    "read_log",
    "read_steps",
    "read_summary",
    "read_verdicts",
    "watch",
    "write_report",
    "write_summary",
    "write_verdicts",
]
