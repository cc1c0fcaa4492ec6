"""The gallery: what it says is what the result files hold."""

from pathlib import Path

from memshard.experiments.common import catalogue
from memshard.experiments.common.gallery import write_gallery
from memshard.experiments.common.run import SUMMARY_FILE, reproduce

DOCS = Path(__file__).parents[3] / "docs"


def test_the_page_is_what_the_results_make_it(tmp_path: Path) -> None:
    page = (DOCS / "gallery.md").read_text()
    assert page == write_gallery(DOCS, tmp_path), "make gallery writes it again"
    assert all(f"### {name}\n" in page for name in catalogue.names())
    drawn = {path.relative_to(tmp_path) for path in tmp_path.rglob("*.png")}
    assert all(
        (DOCS / "pictures" / picture).exists() and f"](pictures/{picture})" in page
        for picture in drawn
    )


def test_a_result_and_its_notes_enter_the_page(tmp_path: Path) -> None:
    results = tmp_path / "results"
    reproduce("reformer/lengths", "smoke", tmp_path / "run", say=lambda text: None)
    results.mkdir()
    (tmp_path / "run" / SUMMARY_FILE).rename(results / "reformer_lengths.json")
    (results / "reformer_lengths.md").write_text("Short ones only.\n")
    page = write_gallery(tmp_path, tmp_path / "pictures")
    entry = page.split("### reformer/lengths")[1].split("\n## ")[0]
    assert (
        "--scale smoke" in entry
        and "Scale smoke: 1 point," in entry
        and entry.endswith("Short ones only.\n")
    )
    assert "](pictures/reformer_lengths/lengths.png)" in entry
    assert (tmp_path / "pictures/reformer_lengths/lengths.png").exists()
    assert page.count("**Not measured yet.**") == len(catalogue.names()) - 1
