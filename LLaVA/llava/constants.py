"""Names and numbers that prompts, tokenisation and the model agree on."""

from __future__ import annotations

# Not a token of any vocabulary: marks, in `input_ids`, the place where an image's features are spliced in.
IMAGE_TOKEN_INDEX = -200
# The label that cross-entropy skips.
IGNORE_INDEX = -100

DEFAULT_IMAGE_TOKEN = "<image>"
DEFAULT_IMAGE_PATCH_TOKEN = "<im_patch>"
DEFAULT_IM_START_TOKEN = "<im_start>"
DEFAULT_IM_END_TOKEN = "<im_end>"
# What a user writes in a question to say where an image goes.
IMAGE_PLACEHOLDER = "<image-placeholder>"

# Seconds; and the folder of log files. Read by serving code only.
CONTROLLER_HEART_BEAT_EXPIRATION = 30
WORKER_HEART_BEAT_INTERVAL = 15
LOGDIR = "."
