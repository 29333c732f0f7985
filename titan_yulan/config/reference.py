"""The generated part of docs/configuration.md, and docs/config.schema.json.

`python -m titan_yulan.config.reference docs` brings both files in the folder `docs` up to date.
"""

from __future__ import annotations

import inspect
import json
import sys
from pathlib import Path

from titan_yulan.config.bind import Key, describe, is_section, keys_of
from titan_yulan.config.override import loading_sections, phase_sections, run_sections
from titan_yulan.config.presets import describe_presets
from titan_yulan.config.schema import schema
from titan_yulan.config.sections import LearningRateSegment, PhaseSection, SourceSection
from titan_yulan.config.show import toml_value

_BEGIN, _END = "<!-- generated: begin -->", "<!-- generated: end -->"


def reference() -> str:
    """Every section and key as Markdown tables."""
    sections = {name: section for name, section in run_sections().items() if name != "data"}
    sections = {"phase": PhaseSection, "phase.lr": LearningRateSegment, **phase_sections(), **sections}
    sections |= {"data": run_sections()["data"], "data.sources.NAME": SourceSection, **loading_sections()}
    return "\n\n".join(_section(name, section) for name, section in sections.items()) + "\n"


def schema_text() -> str:
    """The text of docs/config.schema.json."""
    return json.dumps(schema(), indent=1, ensure_ascii=False) + "\n"


def with_reference(page: str) -> str:
    """`page` with the text between its two markers replaced by the current reference."""
    head, tail = page.index(_BEGIN) + len(_BEGIN), page.index(_END)
    return f"{page[:head]}\n\n{reference()}\n{page[tail:]}"


def _section(name: str, section: type) -> str:
    doc = (inspect.getdoc(section) or "").splitlines()[0]
    if name != "phase.lr":
        doc = doc.split(": ", 1)[-1]  # the title names the section already
    title = f"`[{name}]`" if name != "phase.lr" else "`lr` of a phase: one table or a list of tables"
    lines = [f"### {title}", "", doc[:1].upper() + doc[1:], ""]
    lines += ["| key | value | default | meaning |", "|---|---|---|---|"]
    if name == "model":
        lines.append(f"| `preset` | {describe_presets()} | | a whole model by name; keys written beside it win |")
    lines += [_row(key) for key in keys_of(section).values()]
    return "\n".join(lines)


def _row(key: Key) -> str:
    if is_section(key.type):
        default = ""
    elif key.required:
        default = "**required**"
    else:
        default = f"`{toml_value(key.default)}`"
    value = describe(key.type, key.field.metadata) + (" or 'none'" if key.optional else "")
    cells = [f"`{key.name}`", value, default, key.field.metadata.get("help", "")]
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def main(docs: Path) -> None:
    """Bring the two generated files in `docs` up to date."""
    page = docs / "configuration.md"
    page.write_text(with_reference(page.read_text(encoding="utf-8")), encoding="utf-8")
    (docs / "config.schema.json").write_text(schema_text(), encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
