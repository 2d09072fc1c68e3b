"""The measures of an evaluation: what each is called, what it means, and which way is better; and tables of them."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from microcinema.utils.templates import render

_TABLES = {kind: Path(__file__).with_name("templates") / f"table.{kind}.jinja" for kind in ("md", "tex")}
_TEX = str.maketrans(
    {character: f"\\{character}" for character in "&%$#_{}"}
    | {"~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "\\": r"\textbackslash{}"}
    | {"↑": r"$\uparrow$", "↓": r"$\downarrow$", "±": r"$\pm$"}
)


@dataclass(frozen=True)
class Measure:
    """One number about clips, or about a set of them.

    Attributes:
        key: its name in results.
        unit: `%` for proportions, which are stored as fractions.
    """

    key: str
    label: str
    meaning: str
    unit: str = ""
    better: Literal["higher", "lower", ""] = ""
    digits: int = 3

    def number(self, value: float, signed: bool = False) -> str:
        """With the digits that mean something, without the unit."""
        scaled = 100 * value if self.unit == "%" else value
        return f"{scaled:{'+' if signed else ''}.{self.digits}f}"

    def format(self, value: float) -> str:
        """With digits and unit."""
        return f"{self.number(value)} {self.unit}".rstrip()

    @property
    def title(self) -> str:
        """Its label and unit, and an arrow to what is better, as papers write it."""
        arrow = {"higher": " ↑", "lower": " ↓", "": ""}[self.better]
        return f"{self.label} ({self.unit}){arrow}" if self.unit else f"{self.label}{arrow}"


KEYFRAME_PSNR = Measure("psnr", "Key frame, PSNR", "the key frame in the clip against the given one", "dB", "higher", 1)
KEYFRAME_SSIM = Measure("ssim", "Key frame, SSIM", "the key frame in the clip against the given one", "", "higher")


def tables(header: Sequence[str], rows: Sequence[Sequence[str]]) -> dict[str, str]:
    """The same table in Markdown and in LaTeX (booktabs), by suffix. The first column is the rows' names."""
    latex_cells = [[cell.translate(_TEX) for cell in row] for row in (header, *rows)]
    plain = render(_TABLES["md"], header=header, rows=[[cell.replace("|", r"\|") for cell in row] for row in rows])
    latex = render(_TABLES["tex"], header=latex_cells[0], rows=latex_cells[1:])
    return {"md": plain, "tex": latex}
