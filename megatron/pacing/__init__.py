"""Schedules as pure functions of progress, and the plan of a whole run. Nothing here needs more than Python itself."""

from megatron.growth import grown_seqlen
from megatron.pacing.batch_size_warmup import BatchSizeSchedule, linear_batch_size
from megatron.pacing.learning_rate import LearningRateSchedule
from megatron.pacing.plan import PlannedRun, Schedules, StepPlan, plan_run, sample_steps, walk
from megatron.pacing.seqlen_warmup import SeqlenSchedule
from megatron.progress import Duration, Progress

__all__ = [
    "BatchSizeSchedule",
    "Duration",
    "LearningRateSchedule",
    "PlannedRun",
    "Progress",
    "Schedules",
    "SeqlenSchedule",
    "StepPlan",
    "grown_seqlen",
    "linear_batch_size",
    "plan_run",
    "sample_steps",
    "walk",
]
