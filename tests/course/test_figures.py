"""The figures show the values that they are given."""

import numpy as np
import pytest
import torch

from alignment.course.figures import curves, histograms, metric_curves, planes
from alignment.course.landscape import Landscape
from alignment.runs.folder import RunFiles


def row(split, step, **values):
    return {"stage": "preference", "split": split, "step": step, **values}


def test_curves_are_the_values_by_name():
    [axes] = curves({"a": ([0, 1], [2, 3]), "b": ([0, 1], [5, 4])}, "Title", "x", "y", level=0.5).axes
    assert [line.get_xydata().tolist() for line in axes.lines[:2]] == [[[0, 2], [1, 3]], [[0, 5], [1, 4]]]
    assert axes.lines[2].get_ydata() == [0.5, 0.5]
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["a", "b"]
    assert (axes.get_title(), axes.get_xlabel(), axes.get_ylabel()) == ("Title", "x", "y")


def test_no_two_of_many_curves_look_alike():
    [axes] = curves({str(i): ([0], [i]) for i in range(14)}, "", "", "").axes
    assert len({(line.get_color(), line.get_linestyle()) for line in axes.lines}) == 14


def outlines(figure):
    """Edges and heights of the histograms by name."""
    [axes] = figure.axes
    found = {patch.get_label(): patch.get_xy() for patch in axes.patches}
    return {name: (np.unique(xy[:, 0]).tolist(), xy[:, 1].max()) for name, xy in found.items()}


def test_a_spread_counts_every_value_in_bins_of_the_same_width():
    found = outlines(histograms({"a": [0.0, 0.0, 3.0], "b": [1.5]}, "Title", "share"))
    assert (found["a"][1], found["b"][1]) == (2, 1)
    assert found["a"][0] == found["b"][0] == pytest.approx(np.linspace(0, 3, 31).tolist())


@pytest.mark.parametrize(("highest", "last", "width"), [(4, 4.5, 1), (29, 29.5, 1), (30, 31.5, 2), (60, 62.5, 3)])
def test_every_bin_has_as_many_whole_numbers(highest, last, width):
    [(edges, count)] = outlines(histograms({"a": [0, 0, highest]}, "Title", "words")).values()
    assert edges == np.arange(-0.5, last + width / 2, width).tolist()
    assert count == 2


def test_a_metric_is_lines_in_training_and_points_on_held_out_pairs(tmp_path):
    runs = {
        "first": RunFiles(tmp_path, metrics=[row("train", 1, m=0.5), row("train", 2, m=0.7), row("eval", 2, m=0.6)]),
        "second": RunFiles(
            tmp_path, metrics=[row("train", 1, m=0.1), row("eval", 1, m=0.2), row("train", 2, other=1.0)]
        ),
    }
    [axes] = metric_curves(runs, "m", "share").axes
    first, second, first_points, second_points = axes.lines
    assert first.get_xydata().tolist() == [[1, 0.5], [2, 0.7]]
    assert second.get_xydata().tolist() == [[1, 0.1]]
    assert first_points.get_xydata().tolist() == [[2, 0.6]]
    assert second_points.get_xydata().tolist() == [[1, 0.2]]
    assert first.get_color() == first_points.get_color() != second_points.get_color() == second.get_color()


def test_planes_have_the_loss_as_colour_and_pushes_as_arrows():
    u, v = torch.tensor([0.0, 1.0, 2.0]).repeat(2), torch.tensor([-1.0, 3.0]).repeat_interleave(3)
    pushes = torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0, 6.0])
    found = Landscape(u, v, losses=u + 10 * v, push_up=pushes, push_down=-2 * pushes)
    figure = planes({"a": found, "b": found})
    first, second = (axes for axes in figure.axes if axes.get_title())
    assert (first.get_title(), second.get_title()) == ("a", "b")
    mesh, arrows = first.collections
    assert mesh.get_array().tolist() == [[-10, -9, -8], [30, 31, 32]]
    assert arrows.U.tolist() == pushes.tolist()
    assert arrows.V.tolist() == (2 * pushes).tolist(), "pushing the rejected answer up is an arrow up"
    assert first.get_xlim() == (0, 2)
    assert first.get_ylim() == (-1, 3)
