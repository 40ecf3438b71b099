"""Detokenisers against pairs made by hand from the real sets."""

import pytest

from latentlm.evaluation.detokenisers import (
    detokenise_lambada,
    detokenise_lm1b,
    detokenise_papers,
    detokenise_ptb,
    detokenise_wikitext,
    detokenise_wikitext_line,
)

WIKITEXT = [
    ("= Robert Boulter =", "= Robert Boulter ="),
    ("= = = 2000 – 2005 = = =", "=== 2000 – 2005 ==="),
    ("= = Career = =", "== Career =="),
    ("He had a guest @-@ starring role .", "He had a guest-starring role."),
    ("about 1 @,@ 200 people , or 3 @.@ 5 % .", "about 1,200 people, or 3.5 %."),
    ('the episode " Teddy \'s Story " of the series', 'the episode "Teddy\'s Story" of the series'),
    ("he ( born 1962 ) and [ sic ] { x }", "he (born 1962) and [sic] {x}"),
    ("the players ' union", "the players' union"),
    ("Who ? Me ! Yes : no ; never .", "Who? Me! Yes: no; never."),
    ("at 20 ° C", "at 20°C"),
    ("John N Smith", "John 1 Smith"),  # odd, as in the literature
    ("a . . . b", "a. . . b"),  # the first mark takes the blank of the second
    ("the café of <unk> , 東京", "the café of <unk>, 東京"),
    ("", ""),
    ("x", "x"),
]


@pytest.mark.parametrize("raw, natural", [pair for pair in WIKITEXT if pair[0] != "a . . . b"])
def test_wikitext(raw, natural):
    assert detokenise_wikitext_line(raw) == natural
    assert detokenise_wikitext_line(natural) == natural


def test_wikitext_closes_up_one_mark_after_another_of_its_kind():
    assert detokenise_wikitext(" a . . . b") == " a. .. b"


def test_wikitext_keeps_line_breaks_without_the_blanks_beside_them():
    assert detokenise_wikitext(" one . \n two , three \n") == " one.\ntwo, three\n"


@pytest.mark.parametrize(
    "raw, natural",
    [
        ("the company 's <unk>", "the company's ?"),
        ("no it was n't black monday", "no it wasn't black monday"),
        ("plunged N points", "plunged 1 points"),
        ("more than N N and N N respectively", "more than 1 1 and 1 1 respectively"),
        ("the proposed $ N billion buy-out", "the proposed $1 billion buy-out"),
        ("a # N fine", "a #1 fine"),
        ("in the investors ' standpoint", "in the investors' standpoint"),
        (r"capital cities\/abc", "capital cities/abc"),
        ("N years in N", "N years in N"),  # at the ends of a line it stays, as in the literature
        ("", ""),
        ("N", "N"),
    ],
)
def test_ptb(raw, natural):
    assert detokenise_ptb(raw) == natural
    assert detokenise_ptb(natural) == natural


@pytest.mark.parametrize(
    "raw, natural",
    [
        ("It 's the company 's own .", "It's the company's own."),
        ("See http : / / www.x.org / y .", "See http://www.x.org/y."),
        ('He said : " I will go , " and left .', 'He said: "I will go," and left.'),
        ("Really ? Yes ! No ?", "Really? Yes! No?"),
        ("It cost $ 5 or £ 4 ( or [ more ] ) .", "It cost $5 or £4 (or [more]) ."),
        ("A . B . C .", "A . B. C."),  # a word needs a blank before it
        ("café ; naïve", "café; naïve"),
        ("", ""),
    ],
)
def test_lm1b(raw, natural):
    assert detokenise_lm1b(raw) == natural


def test_lambada_has_straight_quotation_marks_and_begins_with_a_line_break():
    assert detokenise_lambada(" “Go,” she said. I don’t ") == '\n"Go," she said. I don’t'


def test_papers_are_treated_as_wikitext_and_then_as_lm1b():
    raw = "in xmath0 ( 3 @.@ 5 ) , we show that it 's $ 5 ."
    assert detokenise_papers(raw) == "in xmath0 (3.5), we show that it's $5."
    assert detokenise_papers("it is so .") == "it is so."  # the end is of lm1b
