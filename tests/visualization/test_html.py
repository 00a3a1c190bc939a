import base64

from vit_jax.visualization import html

TEXTS = {
    "title": "<run>",
    "classes": "All & more",
    "accuracy": "97.22%",
    "summary": "$5",
    "command": "python train.py",
    "config": "{}",
}


def test_format_report_escapes_strings_and_embeds_figures():
    figures = {"Curves. Loss & accuracy.": b"png"}
    page = html.format_report(
        TEXTS,
        results=[("a < b", "1")],
        classes=[{"class": "<c>", "F1": "0.5"}],
        settings=[("model", "vit")],
        figures=figures,
    )
    assert page.count("&lt;run&gt;") == 2 and "<run>" not in page
    assert "<tr><th>a &lt; b</th><td>1</td></tr>" in page and "$5" in page
    assert "<tr><th>class</th><th>F1</th></tr>\n<tr><td>&lt;c&gt;</td><td>0.5</td></tr>" in page
    assert "<p>All &amp; more</p>" in page and "<h2>Curves</h2>\n<p>Loss &amp; accuracy.</p>" in page
    assert f'src="data:image/png;base64,{base64.b64encode(b"png").decode()}"' in page


def test_format_inspection_formats_text_and_figures_in_order():
    sections = {"Problems. None & nothing.": "a < b", "Samples. Of each class.": b"png"}
    page = html.format_inspection("folder:<x>", "3 images", "$1", sections)
    assert "<h1>folder:&lt;x&gt;</h1>" in page and "<x>" not in page and "$1" in page
    assert "<h2>Problems</h2>\n<p>None &amp; nothing.</p>\n<pre>a &lt; b</pre>\n<h2>Samples</h2>" in page
    assert f'src="data:image/png;base64,{base64.b64encode(b"png").decode()}"' in page
