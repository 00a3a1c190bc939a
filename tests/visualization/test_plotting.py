import numpy as np

from vit_jax.visualization import plotting

RECORDS = [
    {"step": 1, "train/loss": 2.0, "train/accuracy": 0.1, "learning_rate": 0.0},
    {"step": 2, "train/loss": 1.0, "train/accuracy": 0.5, "learning_rate": 0.1},
    {"step": 2, "test/loss": 1.5, "test/accuracy": 0.4, "test/accuracy_top5": 0.9},
]


def test_plot_curves_draws_each_record_at_its_step():
    loss, accuracy, rate = plotting.plot_curves(RECORDS).axes
    np.testing.assert_array_equal(loss.lines[0].get_xydata(), [[1, 2.0], [2, 1.0]])
    np.testing.assert_array_equal(loss.lines[1].get_xydata(), [[2, 1.5]])
    np.testing.assert_array_equal(accuracy.lines[1].get_xydata(), [[2, 0.4]])
    np.testing.assert_array_equal(rate.lines[0].get_xydata(), [[1, 0.0], [2, 0.1]])


def test_plot_curves_labels_axes_and_lines():
    loss, accuracy, rate = plotting.plot_curves(RECORDS, title="digits").axes
    assert [axes.get_title() for axes in (loss, accuracy, rate)] == ["Loss", "Accuracy", "Learning rate"]
    assert all(axes.get_xlabel() == "step" and axes.get_ylabel() for axes in (loss, accuracy, rate))
    assert [text.get_text() for text in loss.get_legend().get_texts()] == ["train (single batches)", "test"]


def test_plot_accuracies_draws_a_line_for_each_run_and_names_its_last_value():
    (axes,) = plotting.plot_accuracies({"ours": RECORDS, "not evaluated": []}, title="digits").axes
    tested = [(record["step"], record["test/accuracy"]) for record in RECORDS if "test/accuracy" in record]
    assert axes.lines[0].get_xydata().tolist() == [list(point) for point in tested]
    labels = [text.get_text() for text in axes.get_legend().get_texts()]
    assert labels == [f"ours: {tested[-1][1]:.1%}", "not evaluated"]
    assert axes.lines[0].get_color() != axes.lines[1].get_color()


def test_titles_above_a_single_picture_are_whole():
    image, weights = np.zeros((1, 32, 32, 3), np.uint8), np.ones((1, 8, 8))
    title = "Attention of the patches, on average: layer 11, mean of its heads"
    figure = plotting.plot_attention(image, weights, ["a_long_name_of_a_file.jpg\nsays something"], title=title)
    figure.draw_without_rendering()
    texts = [figure._suptitle, *(axes.title for axes in figure.axes)]
    for box in (text.get_window_extent() for text in texts):
        assert box.x0 >= 0 and box.x1 <= figure.bbox.width and box.y1 <= figure.bbox.height
