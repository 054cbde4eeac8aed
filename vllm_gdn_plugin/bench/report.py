"""The JSON of any bench read again, and its Markdown and its plot made from it."""

from pathlib import Path

from vllm_gdn_plugin.bench import results
from vllm_gdn_plugin.bench.engine import results as engine_results
from vllm_gdn_plugin.bench.errors import BadInput


def load(path: Path) -> results.Run | engine_results.EngineRun:
    """The run that a bench wrote. Raises BadInput."""
    data = results.read(path)
    written_by = data.pop("format", None)
    if written_by == results.FORMAT:
        return results.parse(path, data)
    if written_by in engine_results.FORMATS.values():
        return engine_results.parse(path, data)
    known = ", ".join(repr(name) for name in (results.FORMAT, *engine_results.FORMATS.values()))
    raise BadInput(f"{path} was not written by this version's bench: its format is none of {known}")


def write_report(path: Path) -> None:
    """Write the Markdown and the plot of a run beside its JSON, and print the Markdown. Raises BadInput."""
    from vllm_gdn_plugin.bench import plot, table
    from vllm_gdn_plugin.bench.engine import plot as engine_plot
    from vllm_gdn_plugin.bench.engine import table as engine_table

    run = load(path)
    text = table.markdown(run) if isinstance(run, results.Run) else engine_table.markdown(run)
    try:
        path.with_suffix(".md").write_text(text, encoding="utf-8")
        if isinstance(run, results.Run):
            plot.plot(run, path.with_suffix(".png"))
        else:
            engine_plot.plot(run, path.with_suffix(".png"))
    except OSError as error:
        raise BadInput(f"the report of {path} cannot be written: {error.strerror}") from error
    print(text)
