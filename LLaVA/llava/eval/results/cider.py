"""CIDEr of single images, with pycocoevalcap's tokeniser (which runs on Java) and scorer."""

from __future__ import annotations

import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

# The report needs the same scores as the table before it, and those of a published benchmark take minutes.
_known: dict[tuple, list[float]] = {}
# The tokeniser's line ends, which are not all of those of Python's splitlines.
_LINE_ENDS = str.maketrans(dict.fromkeys("\n\v\f\r\u2028\u2029", " "))


class CaptionsCannotBeScored(RuntimeError):
    """Java or pycocoevalcap is missing."""


def one_line(caption: str) -> str:
    """The caption without line ends: the tokeniser takes a line for a caption, so one more shifts all that follow."""
    return caption.translate(_LINE_ENDS)


def cider_of_runs(runs: Sequence[tuple[Sequence[str], Sequence[Sequence[str]]]]) -> list[list[float]]:
    """CIDEr of each image of several runs; the mean over a run's images is its corpus score.

    A run is one prediction and several references per image, in the order in which they were scored: the tokeniser
    looks beyond the end of a line, so that in another order the score differs in the third digit. Document frequencies
    are those of all references of a run.

    `CaptionsCannotBeScored` is raised without Java or pycocoevalcap, or if the tokeniser fails.

    Source: Vedantam et al., CVPR 2015.
    """
    keys = [(tuple(predictions), tuple(map(tuple, references))) for predictions, references in runs]
    new = list(dict.fromkeys(key for key in keys if key not in _known))
    blocks = dict.fromkeys(block for predictions, references in new for block in (predictions, _flat(references)))
    # One Java process for all of them: its start costs more than thousands of captions.
    lines = _tokenised([text for block in blocks for text in (*block, "")]) if blocks else []
    tokens = {}
    for block in blocks:
        tokens[block], lines = lines[: len(block)], lines[len(block) + 1 :]
    for predictions, references in new:
        _known[predictions, references] = _scores(tokens[predictions], references, tokens[_flat(references)])
    return [_known[key] for key in keys]


def _scores(predictions: Sequence[str], references: Sequence[Sequence[str]], tokens: Sequence[str]) -> list[float]:
    from pycocoevalcap.cider.cider import Cider

    rest = iter(tokens)
    truth = {number: [next(rest) for _ in several] for number, several in enumerate(references)}
    given = {number: [text] for number, text in enumerate(predictions)}
    return [float(score) for score in Cider().compute_score(truth, given)[1]]


def _tokenised(texts: Sequence[str]) -> list[str]:
    """Penn Treebank tokens, lower-case, punctuation left out, separated by spaces: the scorer's input."""
    try:
        from pycocoevalcap.tokenizer import ptbtokenizer
    except ImportError:
        raise CaptionsCannotBeScored("CIDEr of single images needs pycocoevalcap, which comes with lmms-eval") from None
    if shutil.which("java") is None:
        raise CaptionsCannotBeScored("CIDEr of single images needs Java")
    jar = Path(ptbtokenizer.__file__).parent / ptbtokenizer.STANFORD_CORENLP_3_4_1_JAR
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "captions.txt"
        path.write_text("".join(one_line(text) + "\n" for text in texts), encoding="utf-8")
        command = ["java", "-cp", str(jar), "edu.stanford.nlp.process.PTBTokenizer", "-preserveLines", "-lowerCase"]
        done = subprocess.run([*command, str(path)], capture_output=True, check=False)
    if done.returncode:
        raise CaptionsCannotBeScored(f"Java ended with status {done.returncode} on the captions")
    *lines, _ = done.stdout.decode("utf-8", errors="replace").split("\n")
    if len(lines) != len(texts):
        raise CaptionsCannotBeScored(f"the tokeniser gave {len(lines)} captions for {len(texts)}")
    dropped = set(ptbtokenizer.PUNCTUATIONS)
    return [" ".join(word for word in line.rstrip().split(" ") if word not in dropped) for line in lines]


def _flat(references: Sequence[Sequence[str]]) -> tuple[str, ...]:
    return tuple(text for several in references for text in several)
