"""Configuration in YAML, read strictly: the site's file, a job's own file, schedules, intervals.

Invariants: nothing is guessed or converted silently, all problems of a file are reported at once
with line and column, and what is written reads back equal. YAML is imported when first needed.
"""

from backyfs.config.interval import format_interval, parse_interval
from backyfs.config.job import Job, job_text, read_job, write_job
from backyfs.config.schedule import BUILT_IN, DAILY, HOURLY, Rule, Schedule

__all__ = [
    "BUILT_IN",
    "DAILY",
    "HOURLY",
    "Job",
    "Rule",
    "Schedule",
    "format_interval",
    "job_text",
    "parse_interval",
    "read_job",
    "write_job",
]
