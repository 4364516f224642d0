"""The table's rows: read from runs or published, one per configuration; seeds folded, ranks at equal budget."""

from __future__ import annotations

import json
import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import mean, stdev
from typing import TYPE_CHECKING, Any

from llava.benchmarks import columns_of
from llava.eval.results.runs import Run, differences, short_name

if TYPE_CHECKING:
    from llava.eval.results.evidence import Evidence

PUBLISHED_FILE = Path(__file__).with_name("published.json")
ENCODING = "avg_encoding_latency"
"""lmms-eval's name for the seconds per sample that our model spent on encoding images."""
UNPRUNED, GREY = "unpruned", "grey picture"
MEAN, RANK = "Mean", "Rank"
"""The columns that are no benchmarks."""
EQUAL_BUDGET = 1.1
"""Rows whose kept tokens differ by no more than this factor are ranked, and compared with Random, together."""


@dataclass(frozen=True, eq=False)
class Row:
    """One line of the table; two rows are never equal, so that a row can be a key.

    Attributes
    ----------
    method : str
        "unpruned", "grey picture" (unpruned, on blank images), or the method with the options that were set.
    ratio : float, or None
        Kept ratio as specified; 1 for unpruned, None where the method's options state how much is kept.
    layer : int, or None
        Decoder layer at whose input tokens are dropped; None for several.
    scores : dict
        Column key -> score on the papers' scale; what is missing was not measured.
    source : str
        "measured", or where a published figure stands.
    notes : tuple of str
        Caveats: mini suite, untrained model, a limit on the documents, failed tasks.
    visual_tokens : dict, or None
        See `llava.eval.results.shape.VisualTokens`; older results lack its last two entries.
    relative, rank : float, or None
        Means over the columns: of the score in percent of the unpruned one (same model and source), and of the rank
        among rows of the same model and budget, 1 being the best (published ranks as printed).
    runs : tuple of Run
        What the row was read from; several where seeds were folded.
    seed_spread : dict, or None
        Column key -> standard deviation over the folded seeds.
    filtered : Row, or None
        The same row on the questions that ``downsample`` does not answer (`llava.eval.results.filtered`): percent of
        correct answers; ``questions`` is their number by column key.
    """

    model: str
    method: str
    ratio: float | None
    scores: Mapping[str, float]
    layer: int | None = 0
    source: str = "measured"
    notes: tuple[str, ...] = ()
    visual_tokens: Mapping[str, Any] | None = None
    relative: float | None = None
    rank: float | None = None
    runs: tuple[Run, ...] = ()
    seed_spread: Mapping[str, float] | None = None
    evidence: Evidence | None = None
    filtered: Row | None = None
    questions: Mapping[str, int] | None = None

    @property
    def published(self) -> bool:
        return self.source != "measured"

    @property
    def family(self) -> str:
        """The method without its options."""
        return self.method.partition(" (")[0]

    @property
    def pruned(self) -> bool:
        return self.method not in (UNPRUNED, GREY)

    @property
    def label(self) -> str:
        """Method, ratio and layer, as shown in tables."""
        ratio = "" if self.ratio is None or not self.pruned else f" {self.ratio:g}"
        return f"{self.method}{ratio}{self.series.removeprefix(self.method)}"

    @property
    def series(self) -> str:
        """Method and layer, without the ratio."""
        return self.method + (f", layer {self.layer}" if self.layer else "")

    @property
    def texts(self) -> list[str]:
        """The method as ``--method`` names it; several where seeds were folded, which are then 0, 1, ..."""
        inside = [part.split(" ") for part in _shown_options(self)]
        options = "".join(f":{name}={value}" for name, value, *more in inside if not more)
        seeds = next((range(int(part[2])) for part in inside if part[0] == "mean"), None)
        return [self.family + options + more for more in ([""] if seeds is None else [f":seed={n}" for n in seeds])]

    @property
    def total_tokens(self) -> float | None:
        """Mean over the images of the visual tokens that an unpruned model sees."""
        return self.visual_tokens["total"]["mean"] if self.visual_tokens else None

    @property
    def kept_tokens(self) -> float | None:
        """Mean over the images and the decoder layers of the visual tokens present."""
        if not self.visual_tokens:
            return None
        # Older results state the tokens after the last layer, which are fewer if the decoder drops some.
        return None if self.layer != 0 and self.kept_per_layer is None else self.visual_tokens["kept"]["mean"]

    @property
    def kept_per_layer(self) -> Sequence[float] | None:
        """Mean over the images of the visual tokens present in each decoder layer."""
        return (self.visual_tokens or {}).get("per_layer")

    def score(self, key: str) -> float | None:
        """Of a column, or of `MEAN`."""
        return self.relative if key == MEAN else self.scores.get(key)

    def interval(self, key: str) -> tuple[float, float] | tuple[None, None]:
        """The 95 % interval of a column or of `MEAN`, where there is one."""
        return (self.evidence.intervals.get(key) if self.evidence else None) or (None, None)

    def share_interval(self, key: str) -> tuple[float, float] | tuple[None, None]:
        """The same of the score relative to unpruned, in percent."""
        return (self.evidence.shares.get(key) if self.evidence else None) or (None, None)

    def flops_ratio(self, convention: str) -> float | None:
        """The prefill's FLOPs relative to unpruned, by convention: "literature" or "exact" (see `llava.flops`)."""
        ratios = (self.visual_tokens or {}).get("flops_ratio")
        return ratios[convention] if ratios else None

    def milliseconds(self, part: str) -> float | None:
        """A measured time an image or prompt, "selection" or "prefill", where ``timing`` in the results has it."""
        found = [(run.content.get("timing") or {}).get(f"{part}_ms") for run in self.runs]
        return None if not found or None in found else mean(found)

    @property
    def answer_milliseconds(self) -> float | None:
        """Measured mean time from a prompt to its answer, over all tasks of a run that were timed.

        What encoding the images took is left out: the first row does it for those that follow.
        """
        results = [result for run in self.runs for result in run.tasks.values()]
        timed = [(result.get("samples", 0), _latency(result)) for result in results]
        timed = [(samples, seconds) for samples, seconds in timed if math.isfinite(seconds)]
        samples = sum(samples for samples, _ in timed)
        return 1000 * sum(samples * seconds for samples, seconds in timed) / samples if samples else None


def _latency(result: Mapping[str, Any]) -> float:
    """Seconds per sample without encoding; nan where that was not timed apart and a row before encoded some images."""
    throughput = result.get("throughput") or {}
    remembered = (result.get("visual_cache") or {}).get("hits", 0) and ENCODING not in throughput
    return math.nan if remembered else throughput.get("avg_latency", math.nan) - throughput.get(ENCODING, 0)


def row_of(run: Run) -> Row:
    """The row of one run."""
    content = run.content
    pruning = content["pruning"]
    notes = ["mini suite"] * run.mini + ["untrained"] * (not content["trained"])
    notes += [f"first {content['limit']} documents per task"] * bool(content["limit"])
    notes += [f"{task} failed" for task in content["failed"]]
    return Row(
        model=short_name(content["model"]),
        method=_method(content),
        ratio=1.0 if pruning is None else pruning["ratio"],
        layer=0 if pruning is None else pruning["layer"],
        scores=_scores(run),
        notes=tuple(notes),
        visual_tokens=content["visual_tokens"],
        runs=(run,),
    )


def published_rows(model: str) -> list[Row]:
    """Published figures of a checkpoint, by the last part of its name; none for most models."""
    entries = json.loads(PUBLISHED_FILE.read_text(encoding="utf-8"))
    name = short_name(model)
    own = [entry for entry in entries if entry["model"] == name]
    keys = ("method", "ratio", "scores", "source")
    return [Row(name, **{key: entry[key] for key in keys}, rank=entry.get("average_rank")) for entry in own]


def without_repeats(rows: Sequence[Row], allow_mixed: bool = False) -> list[Row]:
    """Drop rows that occur in several folders; rows of one configuration are put together.

    Two runs of one configuration with different scores are a `ValueError`, unless ``allow_mixed``.
    """
    kept: dict[Any, list[Row]] = {}
    for row in rows:
        same = kept.setdefault(_configuration(row), [])
        if any(other.scores == row.scores and not differences([*other.runs, *row.runs]) for other in same):
            continue
        if same and not allow_mixed:
            raise ValueError(
                f"two runs of {row.model}, {row.label}, have different scores; give one of them, or --allow-mixed"
            )
        same.append(row)
    return [row for same in kept.values() for row in same]


def fold_seeds(rows: Sequence[Row]) -> list[Row]:
    """Replace rows that differ only in their method's seed by one row of means over the seeds."""
    groups: list[list[Row]] = []
    for row in rows:
        group = next((group for group in groups if all(_differ_in_seed_only(row, other) for other in group)), None)
        if group is None:
            groups.append(group := [])
        group.append(row)
    return [group[0] if len(group) == 1 else _folded(group) for group in groups]


def _differ_in_seed_only(one: Row, other: Row) -> bool:
    if _configuration(one, without="seed") != _configuration(other, without="seed"):
        return False
    seeds = [(row.runs[0].content["pruning"] or {}).get("options", {}).get("seed") for row in (one, other)]
    return None not in seeds and seeds[0] != seeds[1] and not differences([*one.runs, *other.runs])


def _folded(group: Sequence[Row]) -> Row:
    first = group[0]
    keys = [key for key in first.scores if all(key in row.scores for row in group)]
    columns = {key: [row.scores[key] for row in group] for key in keys}
    options = [part for part in _shown_options(first) if not part.startswith("seed ")]
    return replace(
        first,
        method=f"{first.family} ({', '.join([f'mean of {len(group)} seeds', *options])})",
        scores={key: mean(values) for key, values in columns.items()},
        runs=tuple(run for row in group for run in row.runs),
        notes=tuple(dict.fromkeys(note for row in group for note in row.notes)),
        seed_spread={key: stdev(values) for key, values in columns.items()},
    )


def same_budget(rows: Iterable[Row]) -> list[list[Row]]:
    """Measured pruned rows of one model that keep equally many tokens (within a tenth), as the mean over the layers.

    Older results do not state the tokens per layer: their ratio stands for it if they drop before the decoder.
    """
    shares = {row: _share(row) for row in rows if row.pruned and not row.published}
    groups: list[list[Row]] = []
    for model in dict.fromkeys(row.model for row in shares):
        smallest = 0.0
        for row in sorted((row for row in shares if row.model == model and shares[row]), key=lambda row: shares[row]):
            if shares[row] > EQUAL_BUDGET * smallest:
                groups.append([])
                smallest = shares[row]
            groups[-1].append(row)
    return groups


def ranked(rows: Sequence[Row]) -> list[Row]:
    """Give rows their mean ranks among those of the same budget; a row that is alone at its budget has none."""
    ranks: dict[Row, float] = {}
    for group in same_budget(rows):
        keys = [key for key in group[0].scores if all(key in row.scores for row in group)]
        for row in group if keys and len(group) > 1 else ():
            ranks[row] = mean(_rank(row.scores[key], [other.scores[key] for other in group]) for key in keys)
    return [replace(row, rank=ranks.get(row)) for row in rows]


def best_of_columns(rows: Iterable[Row]) -> dict[Row, set[str]]:
    """Columns ("Mean" and "Rank" included) in which a row is the best of several that differ at its budget."""
    best: dict[Row, set[str]] = defaultdict(set)
    for group in same_budget(rows):
        for key in (*group[0].scores, MEAN, RANK):
            values = {row: -row.rank if key == RANK and row.rank else row.score(key) for row in group}
            values = {row: value for row, value in values.items() if value is not None}
            if len(set(values.values())) > 1:
                top = max(values.values())
                for row in (row for row, value in values.items() if value == top):
                    best[row].add(key)
    return best


def unpruned_of(row: Row, rows: Iterable[Row]) -> Row | None:
    """The unpruned row of the same model and source."""
    same = (other for other in rows if (other.model, other.source) == (row.model, row.source))
    return next((other for other in same if other.method == UNPRUNED), None)


def relative_score(row: Row, unpruned: Row | None) -> float | None:
    """Mean over common columns of the score relative to unpruned, in percent."""
    full = unpruned.scores if unpruned else {}
    shares = [row.scores[key] / full[key] for key in full if full[key] and key in row.scores]
    return 100 * sum(shares) / len(shares) if shares else None


def _rank(score: float, scores: Sequence[float]) -> float:
    """1 for the highest; equal scores share the mean of their ranks."""
    return 1 + sum(other > score for other in scores) + (scores.count(score) - 1) / 2


def _share(row: Row) -> float | None:
    if row.kept_tokens is None:
        return row.ratio if row.layer == 0 else None
    return row.kept_tokens / row.total_tokens


def _configuration(row: Row, without: str | None = None) -> Any:
    """What two runs of one configuration have in common; one option can be left out."""
    if not row.runs:
        return row
    pruning = row.runs[0].content["pruning"]
    if pruning is None:
        return row.model, row.method
    options = {name: value for name, value in pruning["options"].items() if name != without}
    return row.model, row.family, row.ratio, row.layer, json.dumps(options, sort_keys=True)


def _method(content: Mapping[str, Any]) -> str:
    """The method with those options that were set."""
    pruning = content["pruning"]
    if content.get("grey") or pruning is None:
        return GREY if content.get("grey") else UNPRUNED
    shown = [f"{name} {value}" for name, value in pruning["options"].items() if name in pruning.get("set_options", ())]
    return pruning["method"] + (f" ({', '.join(shown)})" if shown else "")


def _shown_options(row: Row) -> list[str]:
    inside = row.method.partition(" (")[2].removesuffix(")")
    return inside.split(", ") if inside else []


def _scores(run: Run) -> dict[str, float]:
    tasks = {column: column.task_in(run.tasks) for column in columns_of(run.tasks)}
    return {
        column.key: run.tasks[task]["metrics"][column.metric] * column.scale for column, task in tasks.items() if task
    }
