"""The report: one file, nothing from elsewhere, and the numbers of the results."""

import base64
import json
import re
import sys

import numpy as np
import pytest
import torch
from helpers.made_results import Made
from helpers.pages import HOSTILE, Page, require_nothing_from_elsewhere, require_own_policy

from ekfac_dist.errors import ConfigError, OutputError, StoreError
from ekfac_dist.influence.results import DETAILS, MANIFEST, SCORES, TOP, ResultsWriter
from ekfac_dist.report.html import island_text
from ekfac_dist.report.page import write_report
from ekfac_dist.report.spread import NUM_BINS, carriers, distribution


class ReportPage(Page):
    """A report, with its second island."""

    def pair(self, number):
        """A pair's token, module, and layer by token scores, read as the script reads them."""
        pair, data = self.data["pairs"][number], self.data
        arrays = self.scripts[1][pair["start"] : pair["start"] + pair["length"]]
        content = base64.b64decode(arrays, validate=True)
        counts = (pair["positions"], len(data["modules"]), 1)
        tokens, modules, limit = np.split(
            np.frombuffer(content, "<f4", sum(counts)), np.cumsum(counts)[:-1]
        )
        roots = np.frombuffer(content, np.int8, offset=4 * sum(counts)).astype(float) / 127
        return tokens, modules, (limit * roots * np.abs(roots)).reshape(len(data["layers"]), -1)


@pytest.fixture
def report(tmp_path):
    def write(**settings):
        made = Made(**settings)
        output = tmp_path / "report.html"
        write_report(made.write(tmp_path / "scores"), output)
        return made, ReportPage(output.read_text(encoding="utf-8"))

    return write


# -- one file --------------------------------------------------------------------------------------


def test_the_page_needs_nothing_from_elsewhere(report):
    _, page = report()
    require_nothing_from_elsewhere(page)


def test_its_policy_allows_its_own_style_and_script_and_no_other(report):
    _, page = report()
    require_own_policy(page)


def test_a_thousand_sequences_stay_small(report):
    made, page = report(num_queries=1, num_sequences=1200, listed=500, num_tokens=65)
    assert len(page.data["pairs"]) == 1000
    tokens = 1000 * 65
    assert len(page.html) < 150_000 + tokens * (8 + 6 + 2 * made.num_layers)


# -- its numbers -----------------------------------------------------------------------------------


def test_the_islands_hold_the_results_numbers(report):
    made, page = report(num_queries=3)
    data = page.data
    assert len(data["queries"]) == 3
    assert data["layers"] == [f"model.layers.{k}" for k in range(4)]
    for q, query in enumerate(data["queries"]):
        for name, wanted in (("top", made.top[q]), ("bottom", made.bottom[q])):
            assert query[name]["index"] == wanted
            assert query[name]["score"] == made.scores_QN[q, wanted].tolist()
            assert query[name]["share"] == [made.share(q, i) for i in wanted]
            assert [made.pairs[p] for p in query[name]["pair"]] == [(q, i) for i in wanted]
        assert query["members"][0]["completion"] == " Paris"
    assert data["sequences"] == {str(i): tokens for i, tokens in made.sequences.items()}
    details = made.details
    for p in range(len(made.pairs)):
        columns = slice(*details["offsets"][p : p + 2].tolist())
        tokens, modules, layers_LT = page.pair(p)
        assert tokens.tolist() == details["token_scores"][columns].tolist()
        assert modules.tolist() == details["module_scores"][p].tolist()
        exact_LT = details["layer_token_scores"][:, columns].numpy()
        assert np.abs(layers_LT - exact_LT).max() <= np.abs(exact_LT).max() / 127
        q, i = made.pairs[p]
        assert tokens.sum() == pytest.approx(float(made.scores_QN[q, i]), rel=1e-4)


def test_the_manifests_meaning_stands_at_the_top(report):
    _, page = report(normalize="cosine", rescored=20)
    top = page.text[: page.text.index("Sequences")]
    for words in (
        "tiny",
        "true Fisher (labels sampled, seed 0)",
        "λ = 0.1 × mean(Λ)",
        "cosine",
        "of rank 32; scored again exactly: 20 at either end and 20 spread over the data",
        "more of this sequence in the training data makes the query's completion more likely",
        "score / sum of |scores|",
    ):
        assert words in top
    assert page.data["normalize"] == "cosine"
    assert page.data["queries"][0]["top"]["scan_score"] is not None
    assert page.data["queries"][0]["spearman"] == 0.987
    assert page.data["scan_rank"] == 32


@pytest.mark.parametrize(
    ("of", "words"),
    [
        ("inputs", "shaded by what reading each adds"),
        ("outputs", "shaded by what the loss of predicting each does"),
        (None, "shaded by what reading each adds"),  # results of an earlier version
    ],
)
def test_it_is_said_what_the_tokens_are_shaded_by(report, of, words):
    _, page = report(of=of)
    assert words in page.text[: page.text.index("Sequences")]
    assert page.data["tokens"] == (of or "inputs")


def test_nothing_is_said_of_shades_where_there_are_none(report):
    _, page = report(per_token="none")
    assert "shaded by" not in page.text[: page.text.index("Sequences")]


def test_without_a_training_size_no_nats_are_shown(report):
    _, page = report(num_queries=1)
    assert page.data["training_size"] is None
    assert [page.data["queries"][0][name]["nats"] for name in ("top", "bottom")] == [None, None]
    assert "nats" not in page.text.lower()
    assert "Training size" not in page.text


def test_with_one_they_are_of_first_order_and_what_cannot_be_has_a_note(report):
    made, page = report(num_queries=1, training_size=1000)
    (query,) = page.data["queries"]
    for name, wanted in (("top", made.top[0]), ("bottom", made.bottom[0])):
        nats = [made.nats(0, i) for i in wanted]
        assert query[name]["nats"] == nats
        assert [note is not None for note in query[name]["note"]] == [one > 1.25 for one in nats]
    assert "Nats, first order" in page.text
    assert re.search(r"Training size\s*1,000", page.text)


@pytest.mark.parametrize("of", ["inputs", "outputs"])
def test_the_strongest_of_a_sequence_are_the_tokens_with_the_largest_sum(report, of):
    pieces = ["a", "狐", "", "", "b", "c"] * 4
    made, page = report(num_queries=1, tokens=dict.fromkeys(range(60), pieces), of=of)
    starts = [t for t, text in enumerate(pieces) if text]
    for p, pair in enumerate(page.data["pairs"]):
        scores = page.pair(p)[0].astype(np.float64)
        if of == "outputs":  # position t's is of token t + 1
            scores = np.concatenate([[0], scores])
        sums = {
            start: abs(scores[start : start + (3 if pieces[start] == "狐" else 1)].sum())
            for start in starts
        }
        assert sums[pair["strongest"]] == pytest.approx(max(sums.values()))
    assert page.data["sequences"][str(made.top[0][0])] == pieces


def test_no_character_of_the_data_reorders_the_page_or_acts_in_it(report):
    text = "\u202eevil\u2066\x1b[31m\x00"
    _, page = report(num_queries=1, model=text, group=text, prompt=text)
    own = page.html
    for character in text:
        assert character.isprintable() or character not in own, repr(character)
    assert "Influence on U+202EevilU+2066␛[31m␀" in page.text


def test_without_details_the_lists_are_there_without_token_scores(report):
    made, page = report(per_token="none")
    assert page.data["pairs"] == []
    assert page.data["queries"][0]["top"]["pair"] == [None] * made.listed
    assert page.scripts[1] == ""
    assert "--scores.per_token top" in page.scripts[2]


def test_a_group_shows_its_members(report):
    _, page = report(num_queries=1, group="towers")
    (query,) = page.data["queries"]
    assert query["group"] == "towers"
    assert [member["line"] for member in query["members"]] == [1, 2, 3]


def test_many_queries_share_the_text_of_a_sequence(report):
    made, page = report(num_queries=40, num_sequences=30)
    assert len(page.data["queries"]) == 40
    assert len(page.data["sequences"]) == len(made.sequences) <= 30


def test_a_sequence_of_one_token_has_no_scores(report):
    made, page = report(num_sequences=8, tokens={i: [" a"] for i in range(4)})
    shortest = next(p for p, (_, i) in enumerate(made.pairs) if i < 4)
    assert page.data["pairs"][shortest]["positions"] == 0
    assert page.pair(shortest)[0].size == 0


# -- distributions and flags -----------------------------------------------------------------------


def test_the_tails_are_shares_of_each_signs_sum():
    scores = torch.cat([torch.tensor([90.0]), torch.full((10,), 1.0), torch.full((989,), -0.1)])
    spread = distribution(scores)
    assert (spread.num_positive, spread.num_negative, spread.number) == (11, 989, 1000)
    first, second, third = spread.tails
    assert (first.count, second.count, third.count) == (1, 10, 100)
    assert first.positive == pytest.approx(0.9)
    assert second.positive == pytest.approx(0.99)
    assert third.positive == pytest.approx(1.0)
    assert third.negative == pytest.approx(100 / 989)
    assert spread.positive_curve[0] == (1, 90.0)
    assert spread.positive_curve[-1] == (11, 1.0)
    assert spread.mean == pytest.approx(scores.double().mean().item())
    assert spread.median == pytest.approx(-0.1)


@pytest.mark.parametrize(
    "scores",
    [[0.0], [0.0, 0.0], [3.0], [-2.5, -2.5], [1e-30, -1e-30], [-5.0, 1.0, 3e8], [1.0, 2.0, 3.0]],
)
def test_a_histogram_counts_every_score_once_and_its_bins_have_one_sign(scores):
    spread = distribution(torch.tensor(scores, dtype=torch.float64))
    assert sum(spread.counts) == len(scores)
    assert len(spread.counts) <= NUM_BINS
    edge = spread.first_edge / spread.bin_width
    assert edge == pytest.approx(round(edge))  # so that zero is an edge too
    assert spread.first_edge <= min(scores)
    assert spread.first_edge + len(spread.counts) * spread.bin_width >= max(scores)


def test_carriers_are_the_fewest_tokens_that_hold_the_share():
    assert carriers(np.array([0.0, 9.0, -1.0, 0.0])) == 1
    assert carriers(np.array([5.0, -4.0, 1.0])) == 2
    assert carriers(np.ones(10), share=0.95) == 10
    assert carriers(np.zeros(5)) == 0
    assert carriers(np.zeros(0)) == 0


def test_a_score_on_two_tokens_is_flagged_and_an_even_one_is_not(report):
    _, page = report()
    pairs = page.data["pairs"]
    assert all(pairs[p]["few"] and pairs[p]["carriers"] == 2 for p in range(0, len(pairs), 3))
    for p, pair in enumerate(pairs):
        tokens, _, _ = page.pair(p)
        assert pair["few"] == (0 < carriers(tokens) <= min(5, 0.1 * len(tokens)))
        assert abs(tokens[pair["strongest"]]) == np.abs(tokens).max()


# -- text that would be markup ---------------------------------------------------------------------


@pytest.mark.parametrize("text", [*HOSTILE, "\ud83d"])
def test_an_island_is_ascii_without_markup_and_reads_back(text):
    written = island_text({"text": text})
    assert written.isascii()
    assert not set("<>&") & set(written)
    assert "\u2028" not in written
    assert json.loads(written) == {"text": text}


def test_hostile_text_stays_text(report):
    tokens = {i: [*HOSTILE, "end"] for i in range(60)}
    texts = {name: "".join(HOSTILE) for name in ("prompt", "completion", "group", "model")}
    _, page = report(tokens=tokens, **texts)
    assert [tag for tag, _ in page.elements if tag in ("script", "img")] == ["script"] * 3
    assert all(tokens == [*HOSTILE, "end"] for tokens in page.data["sequences"].values())
    assert page.data["queries"][0]["members"][0]["prompt"] == "".join(HOSTILE)
    assert HOSTILE[0] in page.text


# -- refusals --------------------------------------------------------------------------------------


def test_an_output_that_exists_is_refused_and_stays(tmp_path):
    results = Made().write(tmp_path / "scores")
    output = tmp_path / "report.html"
    output.write_text("mine")
    with pytest.raises(OutputError, match=r"report\.html exists already"):
        write_report(results, output)
    assert output.read_text() == "mine"


def test_an_output_in_no_folder_is_refused(tmp_path):
    results = Made().write(tmp_path / "scores")
    with pytest.raises(OutputError, match="there is no folder"):
        write_report(results, tmp_path / "no" / "report.html")
    with pytest.raises(OutputError, match="there is no folder"):
        write_report(results, results / MANIFEST / "report.html")


def test_an_output_in_a_folder_that_cannot_be_written_is_refused(tmp_path, monkeypatch):
    results = Made().write(tmp_path / "scores")
    monkeypatch.setattr("os.access", lambda *_: False)
    with pytest.raises(OutputError, match="cannot be written"):
        write_report(results, tmp_path / "report.html")


def test_without_jinja2_the_extra_is_named(tmp_path, monkeypatch):
    results = Made().write(tmp_path / "scores")
    monkeypatch.setitem(sys.modules, "jinja2", None)
    with pytest.raises(ConfigError, match=r"pip install 'ekfac_dist\[report\]'"):
        write_report(results, tmp_path / "report.html")


def test_results_that_are_none_are_refused_and_nothing_is_written(tmp_path):
    with pytest.raises(StoreError, match=r"manifest\.json cannot be read"):
        write_report(tmp_path / "scores", tmp_path / "report.html")
    assert not (tmp_path / "report.html").exists()


def test_a_changed_file_is_refused(tmp_path):
    results = Made().write(tmp_path / "scores")
    (results / TOP).write_text((results / TOP).read_text().replace("index", "indes"))
    with pytest.raises(StoreError, match=r"top\.jsonl has changed"):
        write_report(results, tmp_path / "report.html")


def spoil(monkeypatch, file, change):
    """Lets results be written with one file's tensors changed."""
    write = ResultsWriter.tensors

    def write_changed(self, name, tensors):
        write(self, name, {**tensors, **change(tensors)} if name == file else tensors)

    monkeypatch.setattr(ResultsWriter, "tensors", write_changed)


@pytest.mark.parametrize(
    ("file", "change", "sentence"),
    [
        (SCORES, lambda t: {"scores": t["scores"] * torch.nan}, "holds NaN or infinity"),
        (SCORES, lambda t: {"scores": t["scores"][:1]}, r"shape \[1, 60\] and .* 2 rows"),
        (
            DETAILS,
            lambda t: {"module_scores": t["module_scores"][:, :2]},
            r"module_scores in details\.safetensors is \[\d+, 2\] and must be \[\d+, 12\]",
        ),
        (DETAILS, lambda t: {"token_scores": t["token_scores"] / 0}, "token_scores .* all finite"),
        (
            DETAILS,
            lambda t: {"offsets": t["offsets"] - (torch.arange(len(t["offsets"])) == 1).long()},
            "there must be one score fewer than tokens",
        ),
    ],
)
def test_tensors_that_do_not_fit_are_refused(tmp_path, monkeypatch, file, change, sentence):
    spoil(monkeypatch, file, change)
    results = Made().write(tmp_path / "scores")
    with pytest.raises(StoreError, match=sentence):
        write_report(results, tmp_path / "report.html")
    assert not (tmp_path / "report.html").exists()


def test_a_manifest_that_lacks_something_is_refused(tmp_path):
    results = Made().write(tmp_path / "scores")
    manifest = json.loads((results / MANIFEST).read_text())
    del manifest["damping"]
    (results / MANIFEST).write_text(json.dumps(manifest))
    with pytest.raises(StoreError, match=r"a file lacks something.*KeyError 'damping'"):
        write_report(results, tmp_path / "report.html")
