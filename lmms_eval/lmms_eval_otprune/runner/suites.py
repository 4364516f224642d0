"""The benchmarks that a run may consist of. Imports nothing beyond the standard library."""

from __future__ import annotations

from dataclasses import dataclass

PAPER_TASKS = (
    "coco2017_cap_val",
    "flickr30k_test",
    "gqa",
    "mmbench_en_dev_static",
    "mme",
    "mmmu_val",
    "nocaps_val",
    "ok_vqa_val2014",
    "pope",
    "scienceqa_img",
    "seedbench",
)


@dataclass(frozen=True)
class Suite:
    """A set of benchmarks and what is evaluated on it unless told otherwise.

    Attributes
    ----------
    name : str
    tasks : tuple of str
        Names that lmms-eval knows, in the order of the table.
    models : tuple of str
    methods : tuple of str
        Those that prune, beside the unpruned model.
    """

    name: str
    tasks: tuple[str, ...]
    models: tuple[str, ...]
    methods: tuple[str, ...]

    def task(self, name: str) -> str:
        """The suite's task behind a name: its own, the published benchmark's, or MMBench's without the judge.

        Raises
        ------
        ValueError
            If the suite has no such task.
        """
        for candidate in (name, f"mini_{name}", f"{name}_static"):
            if candidate in self.tasks:
                return candidate
        raise ValueError(f"the {self.name} suite has no task {name!r}; its tasks: {', '.join(self.tasks)}")


SUITES = {
    "mini": Suite(
        "mini",
        tuple(f"mini_{task.removesuffix('_static')}" for task in PAPER_TASKS),
        ("llava-mini",),
        ("otprune", "random", "divprune"),
    ),
    "paper": Suite(
        "paper",
        PAPER_TASKS,
        ("liuhaotian/llava-v1.5-7b", "liuhaotian/llava-v1.6-vicuna-7b", "liuhaotian/llava-v1.5-13b"),
        ("otprune",),
    ),
}
