"""Where lmms-eval keeps its definition of each benchmark."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lmms_eval.tasks
from lmms_eval.utils import load_yaml_config

_FILES = {
    "coco2017_cap_val": "coco_cap/coco2017_cap_val.yaml",
    "flickr30k_test": "flickr30k/flickr30k_test.yaml",
    "gqa": "gqa/gqa.yaml",
    "mmbench_en_dev": "mmbench/mmbench_en_dev.yaml",
    "mmbench_en_dev_static": "mmbench/mmbench_en_dev_static.yaml",
    "mme": "mme/mme.yaml",
    "mmmu_val": "mmmu/mmmu_val.yaml",
    "nocaps_val": "nocaps/nocaps_val.yaml",
    "ok_vqa_val2014": "ok_vqa/ok_vqa_val2014.yaml",
    "pope": "pope/pope.yaml",
    "scienceqa_img": "scienceqa/scienceqa_img.yaml",
    "seedbench": "seedbench/seedbench.yaml",
}


def definition_file(task: str) -> Path:
    """The YAML file of a builtin benchmark."""
    return Path(lmms_eval.tasks.__file__).parent / _FILES[task]


def definition(task: str) -> dict[str, Any]:
    """The definition itself, its functions imported."""
    return load_yaml_config(yaml_path=str(definition_file(task)), mode="full")
