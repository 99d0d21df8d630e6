"""Plan classes: which computers of volunteers get an app version, and with how many processors.

What a project's ``plan_class_spec.xml`` may hold was read in BOINC's ``sched/plan_class_spec.cpp``.
Without that file the scheduler knows only built-in classes, and vmjob's is none of them.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from vmjob.errors import UsageError
from vmjob.project import names
from vmjob.project.tags import block, flag, tag

__all__ = ["CLASSES", "PREFERENCE", "PlanClass", "spec"]

#: The element of a volunteer's project preferences that allows emulation.
PREFERENCE = "vmjob_emulation"
#: ``api_version`` 7.5 and ``is_wrapper`` are understood from 7.0.0 on: MMmmRR.
LEAST_CLIENT = 70000
#: Under emulation a job takes about ten times as long; of two versions that a computer may have,
#: the scheduler takes the one that promises more.
EMULATED = 0.1
MAX_THREADS = 16


@dataclass(frozen=True)
class PlanClass:
    """One class. ``why`` is for the comment above it.

    ``features``: what the processor must have, all of it (as in /proc/cpuinfo). ``preference``:
    only for volunteers who have set it to 1; ``by_default``: also for those who never saw it.
    ``threads``: at most so many processors, told to the wrapper as ``--nthreads N``.
    ``memory_base_mb`` and ``memory_per_cpu_mb``: the scheduler takes their sum instead of the
    workunit's ``rsc_memory_bound``, and appends ``--memory_size_mb SUM``: that much memory the
    *machine* then has; 0: neither happens.
    """

    name: str
    why: str
    features: tuple[str, ...] = ()
    preference: str = ""
    by_default: bool = False
    threads: int = 1
    flops_scale: float = 1.0
    memory_base_mb: int = 0
    memory_per_cpu_mb: int = 0
    least_client: int = field(default=LEAST_CLIENT)

    @property
    def text(self) -> str:
        names.check_plan_class(self.name)
        if self.memory_per_cpu_mb and self.threads < 2:
            raise UsageError(f"{self.name}: the scheduler looks at memory per processor only where "
                             "there may be several", advice="Use rsc_memory_bound of the workunit.")
        parts = [tag("name", self.name), tag("min_core_client_version", self.least_client)]
        parts += [tag("cpu_feature", each) for each in self.features]
        if self.preference:
            parts += [tag("project_prefs_tag", self.preference), tag("project_prefs_regex", "1"),
                      flag("project_prefs_default_true", self.by_default)]
        if self.threads > 1:
            parts += [tag("min_ncpus", 1), tag("max_threads", self.threads),
                      tag("nthreads_cmdline", 1)]
        if self.memory_per_cpu_mb:
            parts += [tag("mem_usage_base_mb", self.memory_base_mb),
                      tag("mem_usage_per_cpu_mb", self.memory_per_cpu_mb)]
        if self.flops_scale != 1.0:
            parts.append(tag("projected_flops_scale", self.flops_scale))
        comment = f"<!-- {self.why} -->\n" if self.why else ""
        return comment + block("plan_class", parts, "    ")


CLASSES = (
    PlanClass("vmjob", "Any computer whose volunteer has allowed emulation in the project's "
              "preferences. The wrapper takes an accelerator where one works, which the server "
              "cannot know.", preference=PREFERENCE, flops_scale=EMULATED),
    PlanClass("vmjob_mt", "The same with several processors.", preference=PREFERENCE,
              threads=MAX_THREADS, flops_scale=EMULATED),
    # A class asks for all features that it names, so Intel's and AMD's are two.
    PlanClass("vmjob_vmx", "Processors of Intel that can virtualize; no preference is asked. "
              "Where it does not work all the same, the job waits, and the volunteer is told what "
              "to do.", features=("vmx",)),
    PlanClass("vmjob_svm", "The same for processors of AMD.", features=("svm",)),
)


def spec(classes: tuple[PlanClass, ...] = CLASSES) -> str:
    """``plan_class_spec.xml``, to be put (or merged) into the project's directory."""
    return block("plan_classes", [each.text for each in classes], "    ")
