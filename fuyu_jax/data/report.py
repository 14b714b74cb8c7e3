"""What a configuration's data comes to: `python -m fuyu_jax.data.report --config=FILE [--out=DIR]`.

Plans the first epoch and writes `report.txt` and `report.png`: lengths, padding, examples a row,
tokens by source, what cleaning left out, and a strip of packed rows. Nothing is decoded but what
the strip shows and cleaning needs.
"""

import dataclasses
from pathlib import Path

import numpy as np
from jaxtyping import Int64

from fuyu_jax import cli, config
from fuyu_jax.config import TrainConfig
from fuyu_jax.data.layout import LayoutPolicy
from fuyu_jax.data.lengths import measure_visit
from fuyu_jax.data.opening import open_sources, open_tokenizer
from fuyu_jax.data.packed import PackedData
from fuyu_jax.errors import UserError, run_main

STRIP = 12  # rows shown


@dataclasses.dataclass(frozen=True)
class Figures:
    """Of the first epoch; arrays by row, by example, and by source.

    used_tokens, used_patches, examples: of each row. tokens, patches: of each packed example.
    by_source: examples, tokens and patches of each source, by name.
    """

    used_tokens: Int64[np.ndarray, "rows"]
    used_patches: Int64[np.ndarray, "rows"]
    examples: Int64[np.ndarray, "rows"]
    tokens: Int64[np.ndarray, "packed"]
    patches: Int64[np.ndarray, "packed"]
    by_source: dict[str, tuple[int, int, int]]


def figures(data: PackedData) -> Figures:
    """Counts of the first epoch, from lengths alone."""
    rows = data.row_source(0)
    plan, draws = rows.plan, rows.draws
    part, index = draws.part[plan.examples], draws.index[plan.examples]
    tokens, patches = np.zeros(len(part), np.int64), np.zeros(len(part), np.int64)
    by_source = {}
    for k, (source, lengths) in enumerate(zip(data.mixture.parts, data.lengths, strict=True)):
        here = part == k
        tokens[here], patches[here] = lengths.tokens[index[here]], lengths.patches[index[here]]
        if source.policy.changes:  # as drawn in this epoch
            for at in np.flatnonzero(here):
                visit = rows.visit(int(plan.examples[at]))
                tokens[at], patches[at] = measure_visit(source, lengths, data.tokenizer, visit)
        sums = int(here.sum()), int(tokens[here].sum()), int(patches[here].sum())
        by_source[source.name] = sums
    first = plan.offsets[:-1]
    return Figures(
        np.add.reduceat(tokens, first),
        np.add.reduceat(patches, first),
        np.diff(plan.offsets),
        tokens,
        patches,
        by_source,
    )


def as_text(data: PackedData, found: Figures) -> str:
    """The report in lines."""
    plan = data.plan(0)

    def spread(values: np.ndarray) -> str:
        low, middle, high = np.percentile(values, [5, 50, 95])
        return f"{low:.0f} / {middle:.0f} / {high:.0f} (5 %, median, 95 %), most {values.max()}"

    lines = [
        data.report(),
        f"plan {data.hash}, longest wait {plan.max_wait_blocks} blocks",
        f"tokens an example: {spread(found.tokens)}",
        f"patches an example: {spread(found.patches)}",
        f"examples a row: {spread(found.examples)}",
    ]
    total = max(int(found.tokens.sum()), 1)
    for name, (examples, tokens, patches) in found.by_source.items():
        share = tokens / total
        lines.append(
            f"{name}: {examples} examples, {tokens} tokens ({share:.1%}), {patches} patches"
        )
    return "\n".join(lines) + "\n"


def draw(data: PackedData, found: Figures, path: Path) -> None:
    """The page as a picture."""
    from matplotlib.figure import Figure

    plan = data.plan(0)
    figure = Figure(figsize=(11, 9), layout="constrained")
    grid = figure.add_gridspec(3, 3, height_ratios=(1, 1, 1.6))
    for column, (values, label) in enumerate(
        (
            (found.tokens, "tokens an example"),
            (found.patches, "patches an example"),
            (found.examples, "examples a row"),
        )
    ):
        axes = figure.add_subplot(grid[0, column])
        axes.hist(values, bins=40, color="C0")
        axes.set(xlabel=label, ylabel="number")
    budgets = plan.tokens_per_row, max(plan.patches_per_row, 1)
    pairs = zip(budgets, (found.used_tokens, found.used_patches), strict=True)
    for column, (budget, used) in enumerate(pairs):
        axes = figure.add_subplot(grid[1, column])
        axes.hist(used / budget, bins=40, range=(0, 1), color="C2")
        name = ("tokens", "patches")[column]
        axes.set(xlabel=f"share of {budget} {name} used", ylabel="rows")
    axes = figure.add_subplot(grid[1, 2])
    names = list(found.by_source)
    axes.barh(names, [found.by_source[n][1] for n in names], color="C1")
    axes.set(xlabel="tokens by source")
    axes = figure.add_subplot(grid[2, :])
    rows = data.row_source(0)
    for at in range(min(STRIP, len(rows))):
        batch = rows[at].batch
        image = batch.tokens[0] == data.tokenizer.image_id
        for segment in range(1, int(batch.segment_ids[0].max()) + 1):
            here = np.flatnonzero(batch.segment_ids[0] == segment)
            colour = f"C{segment % 10}"
            axes.barh(at, len(here), left=here[0], color=colour, edgecolor="white", linewidth=0.4)
            text = here[~image[here]]
            axes.plot(text, np.full(len(text), at - 0.3), "|", color="black", markersize=2)
    axes.set(
        xlim=(0, plan.tokens_per_row),
        xlabel="tokens of a row; a colour an example; black: tokens that are not patches",
        ylabel="row",
    )
    axes.invert_yaxis()
    figure.savefig(path, dpi=110)


def report(run: TrainConfig, out: Path) -> str:
    """Writes `report.txt` and `report.png` into a folder; returns the text.

    Raises:
      UserError: bad input, as training would find it.
    """
    out.mkdir(parents=True, exist_ok=True)
    sources = open_sources(run.data).clean(out, progress=run.progress)
    tokenizer = open_tokenizer(sources, out)
    mixture = sources.open_mixture("train", run.model, run.seed)
    policy = LayoutPolicy.of(run.model, run.data)
    data = PackedData(mixture, tokenizer, policy, run.data, run.seed)
    found = figures(data)
    text = as_text(data, found)
    if line := sources.cleaning_line():
        sources.keep_cleaning(out)
        text += line + "\n"
    draw(data, found, out / "report.png")
    (out / "report.txt").write_text(text)
    return text


def main() -> None:
    flags = cli.parser(__doc__)
    flags.add_argument("--config", required=True, help="a file with get_config()")
    flags.add_argument("--out", default="report", help="folder for report.txt and report.png")
    args, overrides = cli.parse(flags)
    out = Path(args.out).expanduser()
    if out.is_file():
        raise UserError(f"--out={out}: a file; give a folder")
    print(report(config.load(args.config, overrides), out), end="")
    print(f"{out / 'report.png'}")


if __name__ == "__main__":
    run_main(main)
