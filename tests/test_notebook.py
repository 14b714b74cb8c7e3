"""The notebook runs from top to bottom, and every section leaves its picture."""

import shlex
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

NOTEBOOK = Path(__file__).parent.parent / "notebooks" / "inspect.ipynb"
PICTURES = ("patches", "row", "mask", "attention", "answers")
SMALL = {
    "data.demo_train_images": 64,
    "data.tokens_per_row": 512,
    "data.patches_per_row": 384,
    "rows_per_batch": 1,
    "model.dim": 32,
    "model.num_layers": 2,
    "model.num_heads": 2,
    "model.head_dim": 16,
    "model.mlp_dim": 64,
    "eval.examples": 16,
    "eval.batch_size": 8,
    "eval.max_new_tokens": 12,
    "optim.warmup_steps": 1,
    "progress": "false",
}


@pytest.fixture(scope="module")
def executed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("notebook")
    places = {"data.data_dir": folder / "demo", "workdir": folder / "short"}
    overrides = shlex.join(f"{name}={value}" for name, value in (SMALL | places).items())
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FUYU_JAX_WORKDIR", str(folder / "none"))
        patch.setenv("FUYU_JAX_STEPS", "3")
        patch.setenv("FUYU_JAX_OVERRIDES", overrides)
        patch.setenv("JAX_PLATFORMS", "cpu")
        notebook = nbformat.read(NOTEBOOK, as_version=4)
        resources = {"metadata": {"path": str(NOTEBOOK.parent)}}
        # A cell that raises makes `execute` raise, with the cell and its error.
        NotebookClient(notebook, timeout=300, kernel_name="python3", resources=resources).execute()
    return folder, {cell.id: cell for cell in notebook.cells}


def _outputs(cell, kind):
    return [o.data[kind] for o in cell.outputs if kind in o.get("data", {})]


def _printed(cell):
    return "".join(o.text for o in cell.outputs if o.output_type == "stream")


@pytest.mark.parametrize("id", PICTURES)
def test_each_section_leaves_one_picture(executed, id):
    _, cells = executed
    (picture,) = _outputs(cells[id], "image/png")
    assert len(picture) > 8_000  # base64 of more than an empty frame


def test_it_says_that_a_short_training_answers_badly(executed):
    folder, cells = executed
    text = _printed(cells["model"])
    assert "a short training of 3 steps; expect poor answers" in text
    assert f"model of {folder / 'short'}, 3 steps" in text


def test_figures_are_of_the_demo_set(executed):
    _, cells = executed
    assert "64 examples" in _printed(cells["row"])
    table = _printed(cells["answers"])
    assert all(family in table for family in ("all", "colour", "box", "caption"))


def test_it_is_kept_without_outputs():
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    nbformat.validate(notebook)
    assert (notebook.nbformat, notebook.nbformat_minor) >= (4, 5)
    for cell in notebook.cells:
        assert not cell.get("outputs") and cell.get("execution_count") is None
