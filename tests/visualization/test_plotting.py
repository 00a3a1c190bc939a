import numpy as np
import pytest

from vit_jax.visualization import plotting

RECORDS = [
    {"step": 1, "train/loss": 2.0, "train/accuracy": 0.1, "learning_rate": 0.0},
    {"step": 2, "train/loss": 1.0, "train/accuracy": 0.5, "learning_rate": 0.1},
    {"step": 2, "test/loss": 1.5, "test/accuracy": 0.4, "test/accuracy_top5": 0.9},
]


def test_plot_curves_plots_each_record_at_its_step():
    loss, accuracy, rate = plotting.plot_curves(RECORDS).axes
    np.testing.assert_array_equal(loss.lines[0].get_xydata(), [[1, 2.0], [2, 1.0]])
    np.testing.assert_array_equal(loss.lines[1].get_xydata(), [[2, 1.5]])
    np.testing.assert_array_equal(accuracy.lines[1].get_xydata(), [[2, 0.4]])
    np.testing.assert_array_equal(rate.lines[0].get_xydata(), [[1, 0.0], [2, 0.1]])


def test_plot_curves_labels_axes_and_lines():
    loss, accuracy, rate = plotting.plot_curves(RECORDS, title="digits").axes
    labels = [axes.get_ylabel() for axes in (loss, accuracy, rate)]
    assert labels == ["loss (cross-entropy)", "accuracy", "learning rate"]
    assert all(axes.get_xlabel() == "step" for axes in (loss, accuracy, rate))
    assert [text.get_text() for text in loss.get_legend().get_texts()] == ["train (single batches)", "test"]


def test_plot_accuracies_plots_each_run_and_labels_its_final_accuracy():
    (axes,) = plotting.plot_accuracies({"full": RECORDS, "not evaluated": []}, title="digits").axes
    tested = [(record["step"], record["test/accuracy"]) for record in RECORDS if "test/accuracy" in record]
    assert axes.lines[0].get_xydata().tolist() == [list(point) for point in tested]
    labels = [text.get_text() for text in axes.get_legend().get_texts()]
    assert labels == [f"full: {tested[-1][1]:.1%}", "not evaluated"]
    assert axes.lines[0].get_color() != axes.lines[1].get_color()


def test_plot_rows_plots_each_image_below_name_of_row():
    rows = {name: np.full((3, 4, 4, 3), value, np.uint8) for name, value in (("dark", 10), ("bright", 200))}
    axes = plotting.plot_rows(rows, title="images").axes
    assert [panel.get_title(loc="left") for panel in axes] == ["dark", "", "", "bright", "", ""]
    assert [int(panel.images[0].get_array().max()) for panel in axes] == [10] * 3 + [200] * 3


def test_plot_attention_of_single_image_fits_titles_into_figure():
    image, weights = np.zeros((1, 32, 32, 3), np.uint8), np.ones((1, 8, 8))
    title = "Attention of the patches, on average: layer 11, mean of its heads"
    figure = plotting.plot_attention(image, weights, ["a_long_name_of_a_file.jpg\npredicted: something"], title=title)
    figure.draw_without_rendering()
    texts = [figure._suptitle, *(axes._left_title for axes in figure.axes)]
    for box in (text.get_window_extent() for text in texts):
        assert box.x0 >= 0 and box.x1 <= figure.bbox.width and box.y1 <= figure.bbox.height


def test_plot_attention_scales_each_map_to_its_own_range():
    images, maps = np.zeros((2, 8, 8, 3), np.uint8), np.array([[[0.1, 0.2], [0.3, 0.4]], [[0.0, 0.0], [0.0, 0.9]]])
    figure = plotting.plot_attention(images, maps, ["a", "b"], title="rollout")
    heat = [axes.images[1] for axes in figure.axes if len(axes.images) == 2]
    assert [image.get_clim() for image in heat] == [(0.1, 0.4), (0.0, 0.9)]
    assert [axes.get_xlabel() for axes in figure.axes[1:4:2]] == ["10.00% to 40.00%", "0.00% to 90.00%"]


def test_plot_heads_plots_layers_in_rows_and_maximum_of_each_head():
    weights = np.arange(24, dtype=np.float32).reshape(2, 3, 2, 2) / 100
    figure = plotting.plot_heads(np.zeros((8, 8, 3), np.uint8), weights, title="heads")
    panels = [axes for axes in figure.axes if len(axes.images) == 2]
    assert [axes.get_title() for axes in panels] == ["3%", "7%", "11%", "15%", "19%", "23%"]
    np.testing.assert_array_equal(panels[4].images[1].get_array(), weights[1, 1])


def test_plot_confusion_masks_rows_of_classes_without_images():
    counts = np.array([[3, 1], [0, 0]])
    matrix, table, _ = plotting.plot_confusion(counts, [(0, 1, 1)], ["cat", "dog"], title="").axes
    np.testing.assert_array_equal(matrix.images[0].get_array().filled(-1), [[0.75, 0.25], [-1, -1]])
    assert table.texts[0].get_text() == "1 × cat → dog"


@pytest.mark.parametrize("num_classes", [2, 10, 20, 100])
def test_plot_confusion_fits_labels_into_figure(num_classes):
    names = [f"a_rather_long_name_{i}" for i in range(num_classes)]
    pairs = [(i, 0, 1234) for i in range(1, min(11, num_classes))]
    figure = plotting.plot_confusion(np.eye(num_classes, dtype=int), pairs, names, title="Confusion matrix")
    figure.draw_without_rendering()
    assert figure.bbox.width == plotting.WIDTH * figure.dpi
    box = figure.get_tightbbox()  # inches
    assert min(box.x0, box.y0) >= -0.01 and box.x1 <= plotting.WIDTH and box.y1 <= figure.get_figheight()
    ticks = [label.get_text() for label in figure.axes[0].get_yticklabels()]
    assert ("a rather long n…" in ticks) == (num_classes <= 20)


def test_plot_position_similarity_arranges_maps_by_patch():
    similarity = np.arange(16, dtype=np.float32).reshape(4, 4) / 16
    (image,) = plotting.plot_position_similarity(similarity).axes[0].images
    canvas = image.get_array().filled(-9)
    np.testing.assert_array_equal(canvas[:2, 3:], similarity[1].reshape(2, 2))
    np.testing.assert_array_equal(canvas[2], -9)


def test_plot_reliability_plots_accuracy_and_images_of_each_bin():
    bins = (np.array([0.51, 0.72, 0.95]), np.array([0.4, 0.8, 1.0]), np.array([10, 20, 30]))
    figure = plotting.plot_reliability({"raw": bins, "calibrated": bins}, title="Reliability")
    axes, masses = figure.axes
    diagonal, *lines = axes.lines
    assert diagonal.get_xydata().tolist() == [[0, 0], [1, 1]]
    assert [line.get_xydata().tolist() for line in lines] == [[[0.51, 0.4], [0.72, 0.8], [0.95, 1.0]]] * 2
    assert sum(patch.get_height() for patch in masses.patches) == 120
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["perfect calibration", "raw", "calibrated"]


def test_plot_images_leaves_gap_and_keeps_sizes():
    images = [np.zeros((4, 6, 3), np.uint8), None, np.zeros((5, 5, 3), np.uint8)]
    figure = plotting.plot_images(images, ["a\nb", "", "c"], columns=2, title="images")
    shown = [axes.images[0].get_array().shape if axes.images else None for axes in figure.axes]
    assert shown == [(4, 6, 3), None, (5, 5, 3), None]
    assert [axes.get_title(loc="left") for axes in figure.axes] == ["a\nb", "", "c", ""]


def test_plot_class_counts_plots_bars_of_each_split():
    counts = {"train": np.array([30, 5]), "test": np.array([8, 0])}
    train, test = plotting.plot_class_counts(counts, ["cat", "dog"]).axes
    assert [bar.get_width() for bar in train.patches] == [30, 5] and train.get_title() == "train: 35"
    assert [bar.get_width() for bar in test.patches] == [8, 0]
    assert [label.get_text() for label in train.get_yticklabels()] == ["cat", "dog"]


def test_plot_class_counts_sorts_numbers_of_many_classes():
    (axes,) = plotting.plot_class_counts({"train": np.arange(100)}, [str(i) for i in range(100)]).axes
    assert axes.lines[0].get_ydata().tolist() == list(range(99, -1, -1)) and not axes.patches


def test_plot_image_sizes_scales_points_by_number_of_images():
    sizes = np.array([[20, 10]] * 3 + [[8, 8]])
    (axes,) = plotting.plot_image_sizes(sizes, image_size=16).axes
    points = axes.collections[0]
    assert points.get_offsets().tolist() == [[8, 8], [20, 10]] and points.get_sizes().tolist() == [87, 237]
    assert axes.lines[0].get_xdata()[0] == 16
