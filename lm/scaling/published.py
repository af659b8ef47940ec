"""Laws by name, with their sources, and laws from a fitted law.json: what `lm.plan` plans with."""

from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from lm.command import BadInput, json_object, nearest
from lm.scaling.accounting import PARAMS_CONVENTIONS
from lm.scaling.data_limited import MUENNIGHOFF2023
from lm.scaling.inference import SARDANA2024
from lm.scaling.kaplan import KaplanAllocation
from lm.scaling.law import PowerLawAllocation, TokensPerParameter
from lm.scaling.parametric import BESIROGLU2024, HOFFMANN2022, ParametricLaw

APPROACHES = ("envelope", "isoflop", "parametric")


class TableRow(NamedTuple):
    """A printed row: parameters, FLOPs, tokens, and half a unit of the tokens' last digit."""

    params: float
    flops: float
    tokens: float
    rounding: float

    @property
    def flops_over_6nd(self) -> float:
        return self.flops / (6 * self.params * self.tokens)

    @property
    def misprinted(self) -> bool:
        """C = 6 N D fails by more than the rounding of C (three digits) and of D explains."""
        low, high = (6 * self.params * (self.tokens + s * self.rounding) for s in (-1, 1))
        return not 0.995 * low <= self.flops <= 1.005 * high


def _rows(flops, billions_of_tokens, last_digits) -> tuple[TableRow, ...]:
    sizes = (4e8, 1e9, 1e10, 6.7e10, 1.75e11, 2.8e11, 5.2e11, 1e12, 1e13)
    return tuple(
        TableRow(n, c, d * 1e9, unit * 1e9 / 2)
        for n, c, d, unit in zip(sizes, flops, billions_of_tokens, last_digits, strict=True)
    )


_DIGITS = (0.1, 0.1, 0.1, 100, 100, 100, 100, 100, 100)  # tables print 8.0 billion, 1.5 trillion
# Hoffmann et al. 2022, Table 3 (Approach 1) and Table A3 (Approaches 2 and 3), as printed.
HOFFMANN_TABLES = {
    "envelope": _rows(
        (1.92e19, 1.21e20, 1.23e22, 5.76e23, 3.85e24, 9.90e24, 3.43e25, 1.27e26, 1.30e28),
        (8.0, 20.2, 205.1, 1500, 3700, 5900, 11000, 21200, 216200),
        _DIGITS,
    ),
    "isoflop": _rows(
        (1.84e19, 1.20e20, 1.32e22, 6.88e23, 4.54e24, 1.18e25, 4.19e25, 1.59e26, 1.75e28),
        (7.7, 20.0, 219.5, 1700, 4300, 7100, 13400, 26500, 292000),
        _DIGITS,
    ),
    "parametric": _rows(
        (2.21e19, 1.62e20, 2.46e22, 1.71e24, 1.26e24, 3.52e25, 1.36e26, 5.65e26, 8.55e28),
        (9.2, 27.1, 410.1, 4100, 12000, 20100, 43500, 94100, 1425500),
        _DIGITS,
    ),
}


# Parameters and training tokens, from each model's report.
MODELS = {
    "GPT-3": (175e9, 300e9),
    "Gopher": (280e9, 300e9),
    "Chinchilla": (70e9, 1.4e12),
    "LLaMA 65B": (65e9, 1.4e12),
    "Llama 2 70B": (70e9, 2e12),
    "Llama 3 70B": (70e9, 15e12),
    "Llama 3 8B": (8e9, 15e12),
}


def _line_through(approach: str, source: str) -> PowerLawAllocation:
    """N = k_N C^a through a printed table, which has more digits than the printed exponent.

    The 67B rows are left out: their size is 1 to 3 % off the line that all the others share.
    """
    rows = [row for row in HOFFMANN_TABLES[approach] if row.params != 6.7e10]
    a, log_k = np.polyfit(np.log([r.flops for r in rows]), np.log([r.params for r in rows]), 1)
    return PowerLawAllocation(float(np.exp(log_k)), float(a), source=source)


@dataclass(frozen=True)
class NamedLaw:
    """A law with what a plan must know about it.

    law: has `optimum(flops)`; a `ParametricLaw` also has losses anywhere. flops_range: of the runs
    it was fitted to, None where there were none. params_counted, flops_counted: the conventions
    of its N ("total" where a table does not say) and C. no_loss, no_interval: why the source cannot
    give them ("" where it can). draws: (n, 5) joint draws E, A, B, alpha, beta. flags: the named
    doubts of the fit.
    """

    name: str
    law: ParametricLaw | PowerLawAllocation | TokensPerParameter | KaplanAllocation
    flops_range: tuple[float, float] | None
    params_counted: str = "total"
    flops_counted: str = "6nd"
    no_loss: str = ""
    no_interval: str = "the source publishes no joint draws of its constants"
    draws: np.ndarray | None = None
    flags: tuple[str, ...] = ()

    @property
    def source(self) -> str:
        return self.law.source


_ALLOCATION = "the source publishes the allocation only, not a loss"
_CHINCHILLA_RUNS = (6e18, 3e21)  # the isoFLOP budgets; other runs reach 1e22
_LAWS = {
    law.name: law
    for law in (
        NamedLaw(
            "hoffmann2022:envelope",
            _line_through("envelope", "Hoffmann et al. 2022, Approach 1, line through Table 3"),
            _CHINCHILLA_RUNS,
            no_loss=_ALLOCATION,
        ),
        NamedLaw(
            "hoffmann2022:isoflop",
            _line_through("isoflop", "Hoffmann et al. 2022, Approach 2, line through Table A3"),
            _CHINCHILLA_RUNS,
            no_loss=_ALLOCATION,
        ),
        NamedLaw("hoffmann2022:parametric", HOFFMANN2022, _CHINCHILLA_RUNS),
        # The range is that of the 240 points they read off Hoffmann's Figure 4.
        NamedLaw("besiroglu2024", BESIROGLU2024, (1.4e18, 1.3e22)),
        # 768 to 1.5e9 parameters on 22 million to 23 billion tokens.
        NamedLaw("kaplan2020", KaplanAllocation(), (1e11, 2.1e20), params_counted="non_embedding"),
        NamedLaw(
            "llama3",
            # D* = 0.299 C^0.537, so N = C / 6D. At 3.8e25 this is 389B and 16.29T, not the
            # 402B and 16.55T that the text quotes from unrounded constants.
            PowerLawAllocation(
                1 / (6 * 0.299),
                1 - 0.537,
                source="Llama 3 (Meta 2024), section 3.2.1: D = 0.299 C^0.537",
            ),
            (6e18, 1e22),
            no_loss=_ALLOCATION,
        ),
        NamedLaw("muennighoff2023", MUENNIGHOFF2023.base, (4.3e15, 9.3e21)),
        NamedLaw("sardana2024", SARDANA2024, _CHINCHILLA_RUNS),
    )
}
LAW_NAMES = (*_LAWS, "tokens_per_parameter:RATIO", "FILE.json[:APPROACH]")


def named_law(text: str) -> NamedLaw:
    """The law called `text`: one of LAW_NAMES; `hoffmann2022` alone is its parametric one.

    A law.json without an approach gives its parametric law, else isoflop, else envelope.
    Raises BadInput for an unknown name (with the nearest), ratio, file, approach, or missing key.
    """
    if text == "hoffmann2022":
        text = "hoffmann2022:parametric"
    if text in _LAWS:
        return _LAWS[text]
    if text.partition(":")[0] == "tokens_per_parameter":
        return _ratio_law(text)
    path, _, approach = text.rpartition(":") if text.endswith(APPROACHES) else (text, "", "")
    if path.endswith(".json") or Path(path).is_file():
        return read_law(Path(path), approach)
    raise BadInput(
        f"law {text!r} is not known{nearest(text, LAW_NAMES)} (known: {', '.join(LAW_NAMES)})"
    )


def _ratio_law(text: str) -> NamedLaw:
    given = text.partition(":")[2] or "20"
    try:
        ratio = float(given)
    except ValueError:
        ratio = float("nan")
    if not 0 < ratio < float("inf"):
        raise BadInput(
            f"law {text!r}: the ratio must be a number above 0, as tokens_per_parameter:20"
        )
    return NamedLaw(text, TokensPerParameter(ratio), None, no_loss="a ratio is not a law of loss")


def read_law(path: Path, approach: str = "") -> NamedLaw:
    """One approach of a law.json that `lm.fit` wrote. Raises BadInput naming file and key."""
    content = json_object(path)
    approaches = content.get("approaches")
    if not isinstance(approaches, dict) or not approaches:
        raise BadInput(f"{path}: key 'approaches' is missing; this is not a law.json of lm.fit")
    if not approach:
        approach = next((a for a in reversed(APPROACHES) if a in approaches), "parametric")
    if approach not in approaches:
        raise BadInput(f"{path}: has no approach {approach!r}, only {', '.join(approaches)}")
    entry = approaches[approach]
    name = f"{path.name}:{approach}"
    if not isinstance(entry, dict):
        raise BadInput(f"{path}: approaches.{approach} must be an object, not {entry!r}")

    def number(key: str) -> float:
        value = entry.get(key)
        if not isinstance(value, (int, float)) or not np.isfinite(value):
            raise BadInput(f"{path}: approaches.{approach}.{key} must be a number, not {value!r}")
        if value <= 0 and key not in ("E", "a", "b"):
            raise BadInput(f"{path}: approaches.{approach}.{key} = {value:g}: must be above 0")
        return float(value)

    flops_range = content.get("flops_range")
    if flops_range is not None:
        flops_range = _numbers(flops_range, (2,), f"{path}: flops_range must be [lowest, highest]")
    accounting = content.get("accounting")
    accounting = accounting if isinstance(accounting, dict) else {}
    counted = accounting.get("params")
    shared = {
        "flops_range": flops_range if flops_range is None else tuple(flops_range.tolist()),
        "params_counted": counted if counted in PARAMS_CONVENTIONS else "total",
        "flops_counted": str(accounting.get("flops", "6nd")),
        "flags": tuple(map(str, entry.get("flags") or ())),
    }
    source = f"fitted, {path}"
    if approach != "parametric":
        law = PowerLawAllocation(number("k_N"), number("a"), number("k_D"), number("b"), source)
        return NamedLaw(name, law, no_loss=f"{approach} fits an allocation, not a loss", **shared)
    law = ParametricLaw(*(number(key) for key in ("E", "A", "B", "alpha", "beta")), source)
    if not entry.get("draws"):
        return NamedLaw(name, law, no_interval="the law.json holds no bootstrap draws", **shared)
    wanted = f"{path}: approaches.parametric.draws must be rows of [E, A, B, alpha, beta]"
    draws = _numbers(entry["draws"], (len(entry["draws"]), 5), wanted)
    return NamedLaw(name, law, no_interval="", draws=draws, **shared)


def _numbers(values, shape: tuple[int, ...], wanted: str) -> np.ndarray:
    try:
        array = np.array(values, float)
    except (TypeError, ValueError):
        raise BadInput(wanted) from None
    if array.shape != shape or not np.isfinite(array).all():
        raise BadInput(wanted)
    return array


def hoffmann_tables() -> str:
    """Hoffmann's Table 3 (envelope) and Table A3 (isoflop, parametric): recomputed and printed.

    Rows whose C is not 6 N D within rounding are marked. Equation 10 does not regenerate its own
    table: its unrounded constants ask for 6 to 18 % more tokens than printed.
    """
    titles = {
        "envelope": "Table 3, Approach 1: a line through the printed rows",
        "isoflop": "Table A3, Approach 2: a line through the printed rows",
        "parametric": "Table A3, Approach 3: Equation 10, unrounded constants",
    }
    lines = []
    for approach, title in titles.items():
        law = named_law(f"hoffmann2022:{approach}").law
        lines += [title, "  params   FLOPs    paper   tokens    paper  paper's C/6ND"]
        for row in HOFFMANN_TABLES[approach]:
            flops = (row.params / law.k_N) ** (1 / law.a)
            tokens = flops / (6 * row.params)
            text = (
                f"{row.params:8.3g} {flops:8.3g} {row.flops:8.3g}"
                f" {tokens:8.3g} {row.tokens:8.4g} {row.flops_over_6nd:8.3f}"
            )
            if row.misprinted:
                text += "  MISPRINT: C is not 6 N D"
            if approach != "parametric" and abs(flops / row.flops - 1) > 0.02:
                text += "  OFF the other rows' line"
            lines.append(text)
        lines.append("")
    return "\n".join(lines).rstrip()


def models_table() -> str:
    """Known models' tokens per parameter, beside 20, and the loss Equation 10 expects of them."""
    lines = ["Models                FLOPs  tokens per parameter  over 20  Equation 10's loss"]
    law = named_law("hoffmann2022:parametric").law
    for name, (params, tokens) in MODELS.items():
        lines.append(
            f"  {name:<16}{6 * params * tokens:9.3g} {tokens / params:21.4g}"
            f" {tokens / params / 20:8.3g} {law.loss(params, tokens):19.3f}"
        )
    return "\n".join(lines)
