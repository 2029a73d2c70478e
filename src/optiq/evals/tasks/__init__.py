"""The benchmarks by name; one file each."""

from optiq.evals.task import Task
from optiq.registry import Registry

TASKS: Registry[Task] = Registry(
    "task",
    {
        "bfcl": "optiq.evals.tasks.bfcl:TASK",
        "gsm8k": "optiq.evals.tasks.gsm8k:TASK",
        "hashhop": "optiq.evals.tasks.hashhop:TASK",
        "humaneval": "optiq.evals.tasks.humaneval:TASK",
        "ifeval": "optiq.evals.tasks.ifeval:TASK",
        "mmlu": "optiq.evals.tasks.mmlu:TASK",
    },
)
