"""The switch: environment variables or keyword arguments -> one validated, immutable object."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import types
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from numbers import Integral, Real
from typing import Any, TypeVar

from llava.pruning.base import INSIDE, Pruner
from llava.pruning.methods.ocvtp.variables import SWITCH as OCL_SWITCH
from llava.pruning.methods.ocvtp.variables import as_typed, translated
from llava.pruning.options import (
    LAYER,
    RATIO,
    check_type,
    layer_in,
    option_types,
    ratio_in,
    refuse_options_of_an_alias,
    settings_in,
)
from llava.pruning.own_budget import check_own_budget
from llava.pruning.registry import method_class, resolve_name
from llava.pruning.schedule import Schedule

OFF = "orig"


@dataclass(frozen=True)
class PruningConfig:
    """Which method prunes, where, and how much it keeps.

    Attributes
    ----------
    method : str
        A registered name or alias, any case; stored as the registered name.
    ratio : float or None
        Kept ratio, 0 < ratio <= 1: of the tokens where the method drops once, of the mean over the decoder layers
        where it drops at several. None only for a method whose options say how much it keeps.
    layer : int or None
        0: before the first decoder layer. L: at the input of decoder layer L. None: the method's own default; it stays
        None for a method that drops at several layers.
    options : mapping
        The method's own options; what is left out takes its default.
    typed : mapping
        Of what came from the environment: variable -> ``NAME=value`` as it was typed.

    Raises
    ------
    ValueError
        For an unknown method, a ratio or layer out of range or at odds with the method, an unknown option, or an
        option's value of the wrong type.
    """

    method: str
    ratio: float | None = None
    layer: int | None = None
    options: Mapping[str, Any] = field(default_factory=dict, hash=False)
    typed: Mapping[str, str] = field(default_factory=dict, compare=False, repr=False, kw_only=True)

    def __post_init__(self):
        method = resolve_name(self.method)
        ratio, layer = self.ratio, self.layer
        if ratio is not None and (isinstance(ratio, bool) or not isinstance(ratio, Real) or not 0 < ratio <= 1):
            raise ValueError(f"the kept ratio must be a number with 0 < r <= 1, not {ratio!r}")
        cls = method_class(method)
        if layer is not None and (isinstance(layer, bool) or not isinstance(layer, Integral) or layer < 0):
            raise ValueError(f"the layer must be a whole number >= 0, not {layer!r}")
        types_by_option = option_types(cls)
        if not isinstance(self.options, Mapping):
            raise ValueError(f"the options of {method} must be a mapping of names to values, not {self.options!r}")
        for name, value in self.options.items():
            if name not in types_by_option:
                raise ValueError(
                    f"{method} has no option {name!r}; its options: {', '.join(types_by_option) or 'none'}"
                )
            check_type(f"option {name!r} of {method}", value, types_by_option[name])
        object.__setattr__(self, "method", method)
        object.__setattr__(self, "ratio", None if ratio is None else float(ratio))
        object.__setattr__(self, "options", types.MappingProxyType(dict(self.options)))
        try:
            pruner = self.build_pruner()
            too_early = layer is not None and layer < pruner.first_layer
            layer = pruner.default_layer if layer is None else int(layer)
            if not too_early:
                pruner.check_budget(self.ratio, self.layer)
                check_own_budget(pruner, self.ratio, before=layer == 0 and pruner.where != INSIDE)
        except ValueError as error:
            raise ValueError(f"{method}: {error}") from None
        if too_early:
            default = "" if pruner.default_layer is None else f" (default {pruner.default_layer})"
            raise ValueError(
                f"{method} works inside the decoder: LAYER_INDEX must be at least {pruner.first_layer}{default}, "
                f"not {layer}"
            )
        object.__setattr__(self, "layer", layer)

    def __reduce__(self):
        # The read-only view of the options can be neither copied nor pickled, as a model's copies need.
        return type(self), (self.method, self.ratio, self.layer, dict(self.options))

    @classmethod
    def from_env(cls, environ: Mapping[str, str] = os.environ) -> PruningConfig | None:
        """Read ``BASELINE``, ``SUBSET_RATIO``, ``LAYER_INDEX`` and the method's ``<METHOD>_<OPTION>`` variables.

        Returns
        -------
        PruningConfig, or None
            None when ``BASELINE`` is unset, empty or ORIG.

        Raises
        ------
        ValueError
            Begins with the variable (or those that do not go together) and its value, and says what is allowed: an
            unknown method, half of the switch, a number out of range, an unknown option.
        """
        given, environ = environ, translated(environ)
        baseline = environ.get("BASELINE", "").strip()
        if not baseline:
            for name in (RATIO, LAYER):
                if environ.get(name):
                    raise ValueError(
                        f"{name}={environ[name]} is set but BASELINE is not: name a method (BASELINE=OURS), or "
                        "BASELINE=ORIG for no pruning"
                    )
            return None
        if baseline.lower() == OFF:
            return None
        try:
            method = resolve_name(baseline)
        except ValueError as error:
            raise ValueError(f"BASELINE={baseline}: {error}, or ORIG for no pruning") from None
        refuse_options_of_an_alias(baseline, method, environ)
        settings = {RATIO: ratio_in(environ), LAYER: layer_in(environ), **settings_in(method, environ)}
        typed = {name: text for name, text in as_typed(given, environ).items() if name in settings}
        switch = f"BASELINE={baseline}" if given.get("BASELINE") else OCL_SWITCH + "=1"
        return _blame(lambda rest: _from_settings(method, rest, typed), settings, typed, method, switch)

    def blame(self, attempt: Callable[[PruningConfig], T]) -> T:
        """``attempt(self)``, whose `ValueError` begins with what was typed and it would not be raised without."""
        prefix = f"{self.method.upper()}_"
        settings = {RATIO: self.ratio, LAYER: self.layer}
        settings |= {f"{prefix}{name.upper()}": value for name, value in self.options.items()}
        return _blame(
            lambda rest: attempt(_from_settings(self.method, rest, self.typed)), settings, self.typed, self.method
        )

    @classmethod
    def from_text(cls, text: str, ratio: float | None, environ: Mapping[str, str] = os.environ) -> PruningConfig:
        """Read a method as command lines name it: ``otprune``, ``fastv:layer=3``, ``otprune:gamma=0.05:ratio=0.2``.

        Parameters
        ----------
        text : str
            ``NAME:option=value:...``; "ratio" and "layer" are options of every method.
        ratio : float
            Kept ratio unless ``text`` states one.
        environ : mapping
            Its ``<METHOD>_<OPTION>`` variables count where ``text`` says nothing.

        Raises
        ------
        ValueError
            As `from_env`.
        """
        name, *settings = text.split(":")
        method = resolve_name(name)
        variables = {"ratio": RATIO, "layer": LAYER}
        given = {}
        for setting in settings:
            option, equals, value = setting.partition("=")
            if not (option and equals):
                raise ValueError(f"{text}: an option reads name=value, not {setting!r}")
            variable = variables.get(option.lower(), f"{method}_{option}".upper())
            if variable in given:
                raise ValueError(f"{text}: {option.lower()} is given twice")
            given[variable] = value
        try:
            ratio, layer = ratio_in(given) if RATIO in given else ratio, layer_in(given)
            budget = set(variables.values())
            own = {name: value for name, value in {**environ, **given}.items() if name not in budget}
            return cls(method, ratio, layer, options_from_env(method, own))
        except ValueError as error:
            raise ValueError(f"{text}: {error}") from None

    def to_env(self) -> dict[str, str]:
        """The variables that `from_env` reads this configuration from."""
        method = self.method.upper()
        values = {f"{method}_{name.upper()}": value for name, value in self.options.items()}
        values |= {RATIO: self.ratio, LAYER: self.layer}
        given = {name: int(value) if isinstance(value, bool) else value for name, value in values.items()}
        return {"BASELINE": method} | {name: str(value) for name, value in given.items() if value is not None}

    def build_pruner(self) -> Pruner:
        """The method with these options."""
        return method_class(self.method)(**self.options)

    def for_width(self, width: int) -> PruningConfig:
        """This configuration with every option spelled out that depends on the visual tokens' width."""
        return self._spelled_out(self.build_pruner().for_width(width))

    def for_encoder(self, has_cls: bool) -> PruningConfig:
        """The same for those that depend on whether the vision encoder has a [CLS] token."""
        return self._spelled_out(self.build_pruner().for_encoder(has_cls))

    def _spelled_out(self, resolved: Pruner) -> PruningConfig:
        pruner = self.build_pruner()
        if resolved == pruner:
            return self
        names = [name for name in option_types(type(pruner)) if getattr(resolved, name) != getattr(pruner, name)]
        options = {**self.options, **{name: getattr(resolved, name) for name in names}}
        return dataclasses.replace(self, options=options)

    def schedule(self, num_hidden_layers: int) -> Schedule:
        """Where tokens are dropped and what fraction is there from then on: see `Pruner.schedule_for`.

        Raises
        ------
        ValueError
            When the layer is not one of a decoder of ``num_hidden_layers`` layers, or it cannot meet the budget.
        """
        if self.layer is not None and self.layer >= num_hidden_layers:
            raise ValueError(
                f"LAYER_INDEX={self.layer} is outside the decoder: it has {num_hidden_layers} layers, "
                f"so 0 to {num_hidden_layers - 1} are allowed"
            )
        return self.build_pruner().schedule_for(self.ratio, self.layer, num_hidden_layers)

    def to_dict(self) -> dict[str, Any]:
        """Everything that determines the selection, the method's defaults spelled out; JSON-serialisable."""
        pruner = self.build_pruner()
        usual = {field.name: field.default for field in dataclasses.fields(Pruner)}
        options = {name: getattr(pruner, name) for name in option_types(type(pruner))}
        # Options that every method has are told only where they were chosen.
        told = {name: value for name, value in options.items() if name not in usual or value != usual[name]}
        digests = pruner.digests()
        files = {"files": digests} if digests else {}
        return {"method": self.method, "ratio": self.ratio, "layer": self.layer, "options": told, **files}

    def fingerprint(self) -> str:
        """Twelve hexadecimal digits that differ whenever `to_dict` differs."""
        canonical = json.dumps(self.to_dict(), sort_keys=True, default=str)
        return hashlib.sha256(canonical.encode()).hexdigest()[:12]

    def describe(self) -> str:
        """One line for a person."""
        options = ", ".join(f"{name}={_shown(value)}" for name, value in self.to_dict()["options"].items())
        place = "before the decoder" if self.layer == 0 else f"at decoder layer {self.layer}"
        if self.layer is None:
            place = "in the mean over the decoder layers"
        what = "prunes" if self.ratio is None else f"keeps {100 * self.ratio:.4g} % of the visual tokens"
        if self.ratio is None and self.layer is None:
            place = "on a schedule of its own"
        return f"{self.method} {what} {place}" + (f" ({options})" if options else "")


def _shown(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def options_from_env(method: str, environ: Mapping[str, str] = os.environ) -> dict[str, Any]:
    """What the ``<METHOD>_<OPTION>`` variables say of a registered method.

    Raises
    ------
    ValueError
        For an unknown option, or a value that is none of its own; begins with the variable and its value.
    """
    settings = settings_in(method, environ)
    cls = method_class(method)
    _blame(lambda rest: cls(**_options(method, rest)), settings, as_typed(environ, environ), method)
    return _options(method, settings)


T = TypeVar("T")


def _blame(
    attempt: Callable[[Mapping[str, Any]], T],
    settings: Mapping[str, Any],
    typed: Mapping[str, str],
    method: str,
    otherwise: str = "",
) -> T:
    """``attempt(settings)``; its `ValueError` begins with those of ``typed`` without which it would not be raised.

    ``otherwise`` is what it begins with where that is none of them.
    """
    try:
        return attempt(settings)
    except ValueError as error:
        message = str(error)

    def complaint(without: str) -> str | None:
        try:
            attempt({name: value for name, value in settings.items() if name != without})
        except Exception as error:
            return str(error)
        return None

    left = {name: complaint(without=name) for name in settings if name in typed}
    changed = [name for name in left if left[name] != message]
    # Without a ratio there may be another complaint only because one is needed.
    blamed = [name for name in changed if left[name] is None] or [name for name in changed if name != RATIO] or changed
    begin = " ".join(typed[name] for name in blamed) or otherwise
    message = message.removeprefix(f"{method}: ")
    if begin and not message.startswith(tuple(f"{name}=" for name in blamed)):
        message = f"{begin}: {message}"
    raise ValueError(message) from None


def _options(method: str, settings: Mapping[str, Any]) -> dict[str, Any]:
    prefix = f"{method.upper()}_"
    return {name[len(prefix) :].lower(): value for name, value in settings.items() if name.startswith(prefix)}


def _from_settings(method: str, settings: Mapping[str, Any], typed: Mapping[str, str]) -> PruningConfig:
    """A configuration from values by the names of their variables."""
    return PruningConfig(method, settings.get(RATIO), settings.get(LAYER), _options(method, settings), typed=typed)
