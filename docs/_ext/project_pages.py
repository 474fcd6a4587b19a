"""Pages that are made of the project's own files: the zoo, the measurements, and links between files."""

from collections.abc import Iterable
from typing import Any

from sphinx.application import Sphinx

from tenzoo.zoo import ModelInfo, Result, list_models, model_info

LINKS = {"../benchmarks/README.md": "benchmarks.md"}
"""From links between files of the project to the pages of these files."""

METRICS = {"r2": "R²", "rmse": "RMSE", "bits_per_character": "bits per character"}


def table(header: Iterable[str], rows: Iterable[Iterable[object]]) -> str:
    """A table in Markdown; its cells hold no line breaks."""
    header = list(header)
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(str(cell).replace("|", r"\|") for cell in line) + " |" for line in lines)


def results(found: Iterable[Result]) -> str:
    """Published and measured results of a model."""
    rows = []
    for result in found:
        seeds = ", ".join(map(str, result.seeds))
        what = f"{METRICS.get(result.metric, result.metric)}, {result.split}"
        rows.append([what, result.method or "", f"{result}", result.protocol, result.source or f"seeds {seeds}"])
    return table(["metric and split", "method", "value", "protocol", "source or seeds"], rows)


def section(info: ModelInfo) -> str:
    """What is known of a model that has results."""
    parts = [f"### {info.name}"]
    if info.published:
        parts += ["Published:", results(info.published)]
    if info.measured:
        commands = dict.fromkeys(result.command for result in info.measured if result.command)
        parts += ["Measured:", results(info.measured), "```bash\n" + "\n".join(commands) + "\n```"]
    return "\n\n".join(parts)


def overview(info: ModelInfo) -> list[object]:
    """The row of a model in the table of all."""
    size = "" if info.parameters is None else f"{info.parameters:,}"
    ratio = info.compression
    compression = "" if ratio is None else f"{ratio:,.1f}" if ratio < 100 else f"{ratio:,.0f}"
    known = [str(len(found)) if found else "" for found in (info.published, info.measured)]
    return [f"`{info.name}`", info.model, info.data, size, compression, *known]


def zoo() -> str:
    """The models of the zoo, as of this build."""
    models = [model_info(name) for name in list_models()]
    header = ["name", "model", "data", "parameters", "compression", "published", "measured"]
    known = [section(info) for info in models if info.published or info.measured]
    return "\n\n".join([table(header, map(overview, models)), "## Results", *known])


def fill(app: Sphinx, docname: str, source: list[str]) -> None:
    """Put the zoo where its page asks for it, and let links lead to pages."""
    if "% zoo" in source[0]:
        app.env.note_dependency(str(app.srcdir.parent / "configs" / "results.json"))
        app.env.note_dependency(__file__)
        source[0] = source[0].replace("% zoo", zoo())
    for file, page in LINKS.items():
        source[0] = source[0].replace(f"]({file})", f"]({page})")


def setup(app: Sphinx) -> dict[str, Any]:
    """Called by Sphinx."""
    app.connect("source-read", fill)
    return {"parallel_read_safe": True}
