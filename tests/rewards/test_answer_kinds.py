"""Typed answer checking: each kind by example, the ladder, and what no kind lets through."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rewards.answer import KINDS, correctness, kind_of
from rewards.checks import (
    choice_matches,
    contains_answer,
    is_mostly_number,
    list_matches,
    polarity,
    says_no_answer,
    token_f1,
    yes_no_matches,
)
from rewards.dates import date_matches, read_dates
from rewards.errors import RewardError
from rewards.guesses import count_candidates, offers_more
from rewards.numeric import number_matches, overlap
from rewards.quantities import is_quantity, read_quantities
from rewards.units import read_unit

# ---------------------------------------------------------------- numbers


@pytest.mark.parametrize(
    ("text", "low", "high", "base"),
    [
        ("1,234", 1234, 1234, 1234),
        ("1.234.567,5", 1234567.5, 1234567.5, 1234567.5),
        ("1 234 567", 1234567, 1234567, 1234567),
        ("3,5", 3.5, 3.5, 3.5),
        (".5", 0.5, 0.5, 0.5),
        ("−5", -5, -5, -5),
        ("2.5 million", 2.5e6, 2.5e6, 2.5e6),
        ("$5bn", 5e9, 5e9, 5e9),
        ("5k", 5000, 5000, 5000),
        ("50 %", 50, 50, 0.5),
        ("3.5 × 10^6 m", 3.5e6, 3.5e6, 3.5e6),
        ("1.05 km", 1.05, 1.05, 1050),
        ("20 square kilometres", 20, 20, 20e6),
        ("20 km²", 20, 20, 20e6),
        ("36 km/h", 36, 36, 10),
        ("36 kilometres per hour", 36, 36, 10),
        ("9-10 km", 9, 10, 9000),
        ("between 9 and 10", 9, 10, 9),
        ("2–3 million", 2e6, 3e6, 2e6),
        ("1.5 to 2 million", 1.5e6, 2e6, 1.5e6),
        ("9.5-10 million", 9.5e6, 10e6, 9.5e6),
        ("2-2.5 million", 2e6, 2.5e6, 2e6),
        ("$1.5 to 2 million", 1.5e6, 2e6, 1.5e6),
        ("$1.5-$2 million", 1.5e6, 2e6, 1.5e6),
        ("$800 to $2 million", 800, 2e6, 800),
        ("1 m to 2 million", 1, 2e6, 1),
        ("0.001 to 2e-3", 0.001, 0.002, 0.001),
        ("800 thousand to 2 million", 8e5, 2e6, 8e5),
        ("0.01 to 3", 0.01, 3, 0.01),
        ("twenty-five thousand", 25000, 25000, 25000),
        ("3rd", 3, 3, 3),
    ],
)
def test_a_number_is_read_with_its_scale_and_unit(text, low, high, base):
    (quantity,) = read_quantities(text)
    assert (quantity.low, quantity.high) == pytest.approx((low, high))
    assert quantity.base[0] == pytest.approx(base)


@pytest.mark.parametrize("text", ["A6", "5A", "C3", "", "no idea", "-", "1e999", "IPv6"])
def test_a_code_is_no_number(text):
    assert read_quantities(text) == []
    assert not is_quantity(text)


@pytest.mark.parametrize(
    ("prediction", "gold", "expected"),
    [
        ("1.05 km (3445 ft)", "1050 m", True),
        ("3445 ft (1.05 km)", "1050 m", True),
        ("3,445 feet", "1050 m", True),
        ("1.05 km (3445 ft)", [945, 1155], True),
        ("about 1,050 metres", "1050 m", True),
        ("1050", "1050 m", True),
        ("1050 kg", "1050 m", False),
        ("1.05 km (9000 ft)", "1050 m", False),  # contradicts itself
        ("1.05 km (3465 ft)", "1050 m", True),  # 1056 m says the same, and one of them is right
        # two per cent of the larger number are 20.4 m
        ("1 km (1020.3 m)", "1 km", True),
        ("1 km (1021 m)", "1 km", False),
        # 1055.2 and 1044.9 m: a change of unit may add half a per cent, 5.25 m
        ("3462 ft", "1050 m", True),
        ("3428 ft", "1050 m", True),
        ("3463 ft", "1050 m", False),
        ("5 km, so 5", "5", True),
        ("5 and 5", "5", True),
        ("5 or 7", "5", False),
        ("5, 6, 7, 8", "5", False),
        ("5", "5", True),
        ("five", "5", True),
        ("5.0", "5", True),
        ("5.4", "5", False),  # a count is exact
        ("35 million (2019 estimate)", "35 million", True),
        ("35,000,000 as of 2019", "35 million", True),
        ("34.8 million", "35 million", True),  # 0.5 million is half of the last written digit
        ("36 million", "35 million", False),
        ("35", "35 million", False),
        ("50%", "50 percent", True),
        ("50", "50%", True),
        ("3.14159", "3.14", True),
        ("3.2", "3.14", False),
        ("5 km in 20 minutes", "5 km", True),
        ("9.5-10 km", "9-10 km", True),
        ("no idea", [-1, 1], False),
        ("", "5", False),
        ("A6", "6", False),
    ],
)
def test_the_right_number_is_found_among_several_and_guesses_are_not(prediction, gold, expected):
    assert number_matches(prediction, gold) is expected


def test_a_letter_that_touches_the_digits_makes_no_gold_number():
    assert is_quantity("9 h")
    assert not is_quantity("9H")


def test_ranges_are_compared_by_overlap():
    # [8, 12] and [9, 12]: 3 / 4
    assert overlap((8, 12), (9, 12)) == pytest.approx(0.75)
    assert number_matches("8 to 12", [9, 12])
    # [0, 12] and [9, 12]: 3 / 12
    assert not number_matches("0 to 12", [9, 12])
    # [8, 12] and [9, 14]: 3 / 6
    assert overlap((8, 12), (9, 14)) == overlap((9, 14), (8, 12)) == 0.5
    assert overlap((1, 1), (1, 1)) == 1.0
    assert overlap((1, 2), (3, 4)) == 0.0


def test_a_relative_tolerance_widens_both_sides():
    assert number_matches("95", "100", tolerance=0.05)
    assert number_matches("105", "100", tolerance=0.05)
    assert not number_matches("94", "100", tolerance=0.05)
    # a half of [95, 120] lies in [90, 110], but only a gold range is compared by overlap
    assert not number_matches("95 to 120", "100", tolerance=0.1)


@pytest.mark.parametrize(
    ("text", "unit"),
    [("km wide", "length"), ("square miles", "area"), ("m^3", "volume"), ("people", None)],
)
def test_units_are_read_by_their_dimension(text, unit):
    assert (read_unit(text)[0] or (None,))[0] == unit


# ---------------------------------------------------------------- dates


@pytest.mark.parametrize(
    ("prediction", "gold", "expected"),
    [
        ("5 May 1998", "1998-05-05", True),
        ("May 5th, 1998", "1998-05-05", True),
        ("on the 5th of May 1998", "May 5, 1998", True),
        ("05/06/1998", "1998-06-05", True),
        ("05/06/1998", "1998-05-06", True),
        ("13/06/1998", "1998-06-13", True),
        ("1998", "1998-05-05", False),  # less than was asked for
        ("May 1998", "1998-05-05", False),
        ("5 May 1998", "1998", True),
        ("5 May 1998", "May 1998", True),
        ("6 May 1998", "5 May 1998", False),
        ("1814", "19th century", True),
        ("1800", "19th century", False),
        ("1990s", "1990", False),
        ("44 BC", "44 BCE", True),
        ("44", "44 BC", False),
        # the 5th century BC is 500 to 401 BC, the 1st 100 to 1 BC
        ("5th century BC", "5th century BC", True),
        ("500 BC", "5th century BC", True),
        ("401 BC", "5th century BCE", True),
        ("501 BC", "5th century BC", False),
        ("400 BC", "5th century BC", False),
        ("450", "5th century BC", False),
        ("44 BC", "1st century BC", True),
        ("1495 BC", "1490s BC", True),  # 1499 to 1490 BC
        ("1499 BC", "1490s BC", True),
        ("1489 BC", "1490s BC", False),
        ("1490s BC", "15th century BC", True),
        ("1971 or 1972", "1971", False),
        ("1971 AD", "1971", True),
        ("independent since 1971", "1971", True),
        ("born 1998, 35 years old", "1998", False),
        ("30 February 1998", "February 1998", False),
        ("", "1998", False),
    ],
)
def test_a_date_is_compared_at_the_golds_precision(prediction, gold, expected):
    assert date_matches(prediction, gold) is expected


def test_a_gold_date_that_can_be_read_in_two_ways_is_right_in_both():
    assert date_matches("5 June 1998", "05/06/1998")
    assert date_matches("6 May 1998", "05/06/1998")
    assert not date_matches("7 May 1998", "05/06/1998")


def test_years_may_differ_where_the_question_says_so():
    assert date_matches("1972", "1971", tolerance_years=1)
    assert not date_matches("1973", "1971", tolerance_years=1)
    question = {"answers": ["1971"], "answer_kind": "year", "tolerance": 1}
    assert correctness("1970", question, "typed") == 1.0


def test_digits_that_are_no_date_make_the_text_no_date():
    assert read_dates("1,971") is None
    assert read_dates("nothing") == []


# ---------------------------------------------------------------- other kinds


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Yes", True),
        ("yes, it is", True),
        ("No, it is not.", False),
        ("false", False),
        ("yes and no", None),
        ("not yes", None),
        ("no official symbol", None),
        ("yes-man", None),
        ("true it is", True),
        ("maybe", None),
        ("", None),
    ],
)
def test_yes_and_no(text, expected):
    assert polarity(text) is expected
    assert yes_no_matches(text, "yes") is (expected is True)


@pytest.mark.parametrize(
    ("prediction", "expected"),
    [
        ("B", True),
        ("(b)", True),
        ("B.", True),
        ("option B", True),
        ("B. Rome", True),
        ("Rome", True),
        ("B. Paris", False),
        ("A or B", False),
        ("A, B", False),
        ("A", False),
        ("Paris", False),
        ("E", False),
        ("Bonn or Rome", False),
        ("", False),
    ],
)
def test_a_choice_is_a_letter_its_text_or_both(prediction, expected):
    choices = {"A": "Paris", "B": "Rome", "C": "Bonn"}
    assert choice_matches(prediction, "B", choices) is expected
    assert choice_matches(prediction, "Rome", list(choices.values())) is expected


def test_letters_alone_do_without_the_choices():
    assert choice_matches("(A)", "a")
    assert not choice_matches("A", "B")


@pytest.mark.parametrize(
    ("prediction", "expected"),
    [
        ("red, white and blue", True),
        ("blue; red; white", True),
        ("Blue, white, and red", True),
        ("red and white", False),
        ("red, white, blue, green", False),
        ("red, red, white, blue", False),
        ("", False),
    ],
)
def test_a_list_is_complete_and_no_more(prediction, expected):
    assert list_matches(prediction, ["red", ["white", "silver"], "blue"]) is expected
    question = {"answers": ["red, white and blue"], "answer_kind": "list"}
    assert correctness(prediction, question, "typed") == float(expected)


def test_a_list_without_entries_or_with_one_twice_matches_nothing():
    assert not list_matches("", [])
    assert not list_matches("red", ["red", "Red"])


def test_a_name_with_and_in_it_is_one_entry():
    assert list_matches("Cuba, Trinidad and Tobago", ["Trinidad and Tobago", "Cuba"])


@pytest.mark.parametrize(
    ("prediction", "items", "expected"),
    [
        ("AC/DC, Queen", ["Queen", "AC/DC"], True),
        ("AC/DC/Queen", ["Queen", "AC/DC"], True),
        ("Queen and Washington, D.C.", ["Washington, D.C.", "Queen"], True),
        ("Cuba and Bosnia and Herzegovina", ["Bosnia and Herzegovina", "Cuba"], True),
        ("Cuba, and Bosnia & Herzegovina", ["Bosnia and Herzegovina", "Cuba"], True),
        ("Antigua and Antigua and Barbuda", ["Antigua", "Antigua and Barbuda"], True),
        ("Queen; Earth, Wind & Fire", [["Earth, Wind & Fire", "EWF"], "Queen"], True),
        ("and then there were none and Emma", ["And Then There Were None", "Emma"], True),
        ("AC/DC, AC/DC, Queen", ["Queen", "AC/DC"], False),
        ("AC/DC, Queen, Abba", ["Queen", "AC/DC"], False),
        ("AC/DC", ["Queen", "AC/DC"], False),
        ("Bosnia, Herzegovina and Cuba", ["Bosnia and Herzegovina", "Cuba"], False),
        ("New, York, AC/DC", ["New York", "AC/DC"], False),  # a name without one is not joined
        ("AC/DCs, Queen", ["Queen", "AC/DC"], False),
        ("red and blue", ["red", ["blue", "\n"]], True),
    ],
)
def test_a_name_with_a_separator_in_it_is_one_entry(prediction, items, expected):
    assert list_matches(prediction, items) is expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Unanswerable", True),
        ("The question cannot be answered.", True),
        ("cannot be answered because the page is gone", True),
        ("Unable to answer due to lack of relevant information", True),
        ("unknown soldier", False),
        ("Paris", False),
        ("", False),
    ],
)
def test_cannot_be_answered(text, expected):
    assert says_no_answer(text) is expected


@pytest.mark.parametrize(
    ("prediction", "expected"),
    [
        ("Paris", True),
        ("It is Paris.", True),
        ("Paris or Rome", False),
        ("Paris, Rome", False),
        ("Paris/Rome", False),
        ("not Paris", False),
        ("It isn't Paris", False),
        ("Parisian", False),
    ],
)
def test_containment_takes_neither_lists_nor_denials(prediction, expected):
    assert contains_answer(prediction, "Paris") is expected


@pytest.mark.parametrize(
    ("prediction", "golds"),
    [("It is Paris", ["Italy", "IT"]), ("No idea", ["Norway", "NO"]), ("in Paris", ["India", "IN"]),
     ("Show me", ["Montenegro", "ME"])],
)  # fmt: skip
def test_the_code_of_a_country_is_not_found_in_a_sentence(prediction, golds):
    question = {"question": "Which country is it?", "answers": golds}
    for match in ("contains", "f1", "typed"):
        assert correctness(prediction, question, match) == 0.0
        assert correctness(golds[1], question, match) == 1.0  # alone it is an answer
        assert correctness(golds[0], question, match) == 1.0


def test_small_words_count_where_no_gold_answer_has_others():
    for answers in (["no"], ["No", "It is not"]):
        question = {"question": "Which?", "answers": answers}
        assert correctness("The answer is no", question, "contains") == 1.0
        assert correctness("The answer is no", question, "f1") > 0.0
    assert correctness("It is The Who", {"answers": ["The Who"]}, "contains") == 1.0


@pytest.mark.parametrize(
    "guess",
    [
        "Rome Paris Bonn", "Rome Paris Bonn Madrid Berlin Vienna", "Rome\tParis\tBonn",
        "Rome. Paris", "Rome! Paris!", "Rome... Paris", "Rome - Paris", "Rome – Paris",
        "Rome — Paris", "Rome—Paris", "Rome (Paris) (Bonn)", "Rome [Paris] [Bonn]",
        "Rome: Paris: Bonn", "Rome、Paris", "Rome， Paris", "Rome in Paris in Bonn",
        "1. Rome 2. Paris 3. Bonn", "Rome Paris Bonn, capital of France",
    ],
)  # fmt: skip
def test_a_list_of_guesses_is_wrong_whatever_stands_between_them(guess):
    asked = {"question": "Which city is the capital of France?", "answers": ["Paris"]}
    assert correctness(guess, asked, "contains") == 0.0


@pytest.mark.parametrize("mark", ["({})", "[{}]", "is: {}"])
def test_one_aside_explains_and_a_second_one_lists(mark):
    one, two = (" ".join(["Paris", *map(mark.format, names)]) for names in ("F", "FE"))
    assert not offers_more(one, "Paris")
    assert offers_more(two, "Paris")
    assert not offers_more(two, one)  # gold has an aside of its own


@pytest.mark.parametrize(
    ("text", "is_number"),
    [("35 million whales", True), ("35 million blue whales", False), ("Apollo 11", False)],
)
def test_a_number_has_at_most_one_strange_word_behind_it(text, is_number):
    assert is_mostly_number(text) == is_number


@pytest.mark.parametrize(
    ("answer", "gold", "question"),
    [
        ("The capital of France is Paris.", "Paris", "What is the capital of France?"),
        ("Paris, France", "Paris", "What is the capital of France?"),
        ("Paris. It is the capital of France.", "Paris", "What is the capital of France?"),
        ("The answer is: Paris", "Paris", "Where?"),
        ("Paris (France)", "Paris", "Where?"),
        ("It is in St. Louis (Missouri)", "St. Louis", "Where is the arch?"),
        ("Prof. Jean-Paul Sartre", "Jean-Paul Sartre", "Who?"),
        ("He is the philosopher Jean-Paul Sartre", "Sartre", "Who is Jean-Paul?"),
        ("It was U.S. Steel.", "U.S. Steel", "Which company?"),
        ("on 5 May 1998", "5 May 1998", "When?"),
        ("12 June 1998", "1998", "When?"),
        ("from 1914 - 1918", "1914-1918", "When?"),
        ("World War I (1914 - 1918)", "World War I", "Which war?"),
        ("about 35 million people", "35", "How many?"),
        ("It is Star Wars: Episode IV (1977)", "Star Wars: Episode IV", "Which film?"),
        ("They are red, white and blue", "red, white and blue", "Which colours?"),
        ("It is red", "red", "Is red or blue meant?"),
    ],
)
def test_what_explains_an_answer_is_no_list_of_guesses(answer, gold, question):
    assert correctness(answer, {"question": question, "answers": [gold]}, "contains") == 1.0
    assert correctness(answer, {"question": question, "answers": [gold]}, "f1") > 0.0


@pytest.mark.parametrize("guess", ["blue red", "red, blue", "red blue", "red is not blue"])
def test_both_of_two_answers_that_the_question_names_are_no_answer(guess):
    asked = {"question": "Is red or blue meant?", "answers": ["red"]}
    assert correctness(guess, asked, "contains") == 0.0


def test_one_strange_word_may_explain_and_a_second_may_be_a_guess():
    assert contains_answer("Emperor Paris", "Paris")
    assert not contains_answer("Emperor Maximilian Paris", "Paris")
    # a number is a guess where a number is asked for: 6 and 7 beside 5
    assert contains_answer("Paris 6 7", "Paris")
    assert not contains_answer("5 6 7", "5")


def test_f1_takes_off_for_strange_words_until_they_are_a_list():
    asked = {"question": "Which?", "answers": ["Paris"]}
    # 2 * 1 / (1 + 5) with four strange words; with five it is a list
    assert correctness("Rome Bonn Paris Oslo Riga", asked, "f1") == pytest.approx(1 / 3)
    assert correctness("Rome Bonn Paris Oslo Riga Kiev", asked, "f1") == 0.0
    for mark in (". ", " - ", "—"):
        assert correctness(mark.join(("Rome", "Paris")), asked, "f1") == 0.0
    # of a long gold answer a near miss has as many others: 2 * 1 / (6 + 6)
    long = {"question": "Which?", "answers": ["one two three four five six"]}
    assert correctness("six blue red pink grey gold", long, "f1") == pytest.approx(1 / 6)


def test_candidates_are_counted_against_the_golds_own_parts():
    assert count_candidates("Washington, D.C.") == 2
    assert contains_answer("It is Washington, D.C.", "Washington, D.C.")
    assert not contains_answer("Washington, D.C., or Rome", "Washington, D.C.")


def test_token_f1_by_hand():
    # 2 shared of 3 and 2 tokens: 2 * 2 / 5
    assert token_f1("Kingdom of Spain", "of Spain") == pytest.approx(0.8)
    assert token_f1("a b b", "b b b") == pytest.approx(0.8)  # "a" is an article: 2 * 2 / 5
    assert token_f1("", "") == 0.0


# ---------------------------------------------------------------- the ladder


@pytest.mark.parametrize(
    ("gold", "kind"),
    [
        ("1971", "year"),
        ("5 May 1998", "date"),
        ("1998-05-05", "date"),
        ("1,050 m", "number"),
        ("35 million", "number"),
        ("yes", "yes_no"),
        ("unanswerable", "no_answer"),
        ("Paris", "text"),
        ("5A", "text"),
        ("A6", "text"),
        ("Apollo 11", "text"),
        ("The 39 Steps", "text"),
        (".fr", "text"),
    ],
)
def test_a_gold_answer_shows_its_kind(gold, kind):
    assert kind_of(gold) == kind
    assert kind in KINDS


def test_the_ladder_goes_from_exact_to_the_kind():
    question = {"answers": ["1,050 m"]}
    assert correctness("1.05 km", question) == 0.0
    assert correctness("1.05 km", question, "typed") == 1.0
    assert correctness("1050 m", question, "typed") == 1.0
    assert correctness(None, question, "typed") == 0.0
    assert correctness("\u200b", question, "typed") == 0.0


@pytest.mark.parametrize(
    ("prediction", "golds", "expected"),
    [
        ("No, that cannot be told", ["Norway", "NO"], 0.0),
        ("I don't know", ["Unknown", "Unknown Pleasures"], 0.0),
        ("No, it is not", ["no"], 1.0),
        ("Yes, it is", ["yes", "true", "Yes, it does"], 1.0),
        ("I don't know", ["unknown", "unanswerable"], 1.0),
        ("No, it is not", ["no", "unanswerable", ""], 1.0),
    ],
)
def test_yes_no_and_no_answer_are_shown_by_all_gold_answers_or_by_none(prediction, golds, expected):
    assert correctness(prediction, {"answers": golds}, "typed") == expected
    if expected:
        stated = {"answers": ["Norway", "NO"], "answer_kind": "yes_no"}
        assert correctness("No, it is not", stated, "typed") == 1.0


def test_a_share_of_a_year_makes_a_number_of_it():
    share = {"answers": ["1500"], "tolerance": 0.1}  # 1350 to 1650
    assert [correctness(text, share, "typed") for text in ("1600", "1700")] == [1.0, 0.0]
    assert correctness("1600", share | {"answer_kind": "year"}, "typed") == 0.0
    for tolerance, right in ((None, "1500"), (0, "1500"), (1, "1501"), (20, "1520")):
        years = {"answers": ["1500"], "tolerance": tolerance}
        assert correctness(f"in {right}", years, "typed") == 1.0
        assert correctness(f"in {int(right) + 1}", years, "typed") == 0.0


def test_a_number_that_is_only_mentioned_is_another_answer():
    code = {"answers": ["2"]}
    assert correctness("palm tree over two crossed swords", code, "typed") == 0.0
    assert correctness("Apollo 2", code, "typed") == 0.0
    assert correctness("about 2 people", code, "typed") == 1.0
    asked_for = {"answers": ["2"], "answer_kind": "number"}
    assert correctness("There are two of them", asked_for, "typed") == 1.0


def test_a_range_and_items_of_the_question_decide():
    assert correctness("1000 m", {"answers": [], "range": [945, 1155]}, "typed") == 1.0
    assert correctness("2000 m", {"answers": [], "range": [945, 1155]}, "typed") == 0.0
    question = {"answers": ["x"], "items": ["red", "blue"]}
    assert correctness("blue, red", question, "typed") == 1.0


@pytest.mark.parametrize("items", [None, "", [], ()])
def test_no_items_are_none(items):
    question = {"answers": ["red, blue"], "answer_kind": "list", "items": items}
    assert correctness("blue; red", question, "typed") == 1.0


@pytest.mark.parametrize(("gold", "kind"), [("10", "number"), ("1998", "year")])
def test_an_empty_tolerance_is_none(gold, kind):
    question = {"answers": [gold], "answer_kind": kind, "tolerance": None}
    assert correctness(f"in {gold}", question, "typed") == 1.0
    assert correctness(f"in {int(gold) + 1}", question, "typed") == 0.0


def test_the_unit_of_a_bare_gold_number_can_be_stated():
    question = {"answers": ["1050"], "answer_kind": "number", "unit": "m"}
    assert correctness("1.05 km", question, "typed") == 1.0
    assert correctness("1050 kg", question, "typed") == 0.0


def test_a_unit_that_is_no_text_is_named_and_one_that_is_unknown_is_none():
    for kind in ({"answer_kind": "number"}, {"range": [1000, 1100]}):
        question = {"id": "q1", "answers": ["1050"], **kind}
        assert correctness("1050.0", question | {"unit": "people"}, "typed") == 1.0
        assert correctness("1050.0", question | {"unit": ""}, "typed") == 1.0
        with pytest.raises(RewardError, match="unit 7 of question q1 is no text; write one, as"):
            correctness("1050.0", question | {"unit": 7}, "typed")


def test_a_choice_question_reads_its_choices():
    question = {"answers": ["B"], "answer_kind": "choice", "choices": ["Paris", "Rome"]}
    assert correctness("Rome", question, "typed") == 1.0
    assert correctness("Paris", question, "typed") == 0.0


def test_unknown_ways_and_kinds_are_refused():
    with pytest.raises(RewardError, match="answer_match: no way 'fuzzy'"):
        correctness("x", {"answers": ["x"]}, "fuzzy")
    with pytest.raises(RewardError, match="answer_kind 'colour' of question q1"):
        correctness("x", {"id": "q1", "answers": ["y"], "answer_kind": "colour"}, "typed")


def test_every_way_has_the_limit_on_length_and_takes_the_best_gold_answer():
    for match in ("exact", "typed", "contains", "f1"):
        assert correctness("x" * 200, {"answers": ["x" * 200]}, match) == 1.0
        assert correctness("x" * 201, {"answers": ["x" * 201]}, match) == 0.0
    two = {"question": "Which city is it?", "answers": ["Paname", "City of Light"]}
    assert correctness("It must be Paname", two, "contains") == 1.0
    assert correctness("of light", two, "f1") == pytest.approx(0.8)


def test_a_denial_and_the_question_itself_earn_nothing():
    for guess in ("not Paris", "Paris or Rome"):
        assert correctness(guess, {"answers": ["Paris"]}, "f1") == 0.0
    asked = {"question": "Is the red one meant?", "answers": ["red"]}
    assert correctness("Is the red one meant?", asked, "f1") == 0.0
    assert correctness("Is the red one meant?", asked, "contains") == 0.0
    # a gold answer that is the question's words is an answer all the same: 2 * 1 / (1 + 2)
    words = {"question": "Red blue?", "answers": ["red blue"]}
    assert correctness("red", words, "f1") == pytest.approx(2 / 3)


def test_f1_gives_part_of_the_reward_but_not_for_the_questions_own_words():
    question = {"question": "Which city is it?", "answers": ["City of Light"]}
    # light, of: 2 * 2 / 5
    assert correctness("of light", question, "f1") == pytest.approx(0.8)
    assert correctness("city", question, "f1") == 0.0
    assert correctness("Which city is it? City of Light", question, "f1") == 0.0
    either = {"question": "Is red or blue meant?", "answers": ["red"]}
    assert correctness("red", either, "f1") == 1.0


# ---------------------------------------------------------------- properties

PIECES = (
    "1", "5", "12", "1,050", "3.5", "-", "–", "m", "km", "%", "million", "BC", "19th", "century",
    "May", "1998", "2019", "(", ")", "or", "and", "not", "yes", "no", "A", "B", ",", ";", "/",
    "the", "Paris", "unknown", "because", "\u200b", "×", "^", "10", "€",
)  # fmt: skip
answers = st.one_of(
    st.text(st.characters(), max_size=30),
    st.lists(st.sampled_from(PIECES), max_size=8).map(" ".join),
)


@settings(max_examples=500)
@given(
    answers, st.lists(answers, max_size=3), st.sampled_from(["exact", "typed", "contains", "f1"])
)
def test_correctness_is_total_and_bounded(prediction, golds, match):
    assert 0.0 <= correctness(prediction, {"question": "q", "answers": golds}, match) <= 1.0


@given(answers, st.lists(answers, min_size=1, max_size=2), st.sampled_from(KINDS))
def test_every_stated_kind_is_total(prediction, golds, kind):
    question = {"answers": golds, "answer_kind": kind, "choices": golds, "unit": golds[0]}
    assert correctness(prediction, question, "typed") in (0.0, 1.0)


@given(answers, answers)
def test_what_should_be_symmetric_is(one, other):
    assert token_f1(one, other) == token_f1(other, one)
    assert yes_no_matches(one, other) == yes_no_matches(other, one)
    assert correctness(one, {"answers": [other]}) == correctness(other, {"answers": [one]})


@given(answers)
def test_a_looser_way_never_takes_back_an_exact_match(text):
    question = {"answers": [text]}
    exact = correctness(text, question)
    assert all(correctness(text, question, match) == exact for match in ("typed", "contains", "f1"))


finite = st.floats(allow_nan=False, allow_infinity=False)


@given(st.tuples(finite, finite), st.tuples(finite, finite))
def test_overlap_is_symmetric_and_bounded(one, other):
    one, other = tuple(sorted(one)), tuple(sorted(other))
    assert 0.0 <= overlap(one, other) <= 1.0
    assert overlap(one, other) == overlap(other, one)


@given(st.integers(-(10**9), 10**9), st.sampled_from(["", " m", " kg", "%", " million"]))
def test_a_number_matches_itself_and_not_its_neighbour(value, unit):
    assert number_matches(f"{value}{unit}", f"{value}{unit}")
    assert not number_matches(f"{value + 1}{unit}", f"{value}{unit}")


@given(st.dates())
def test_a_date_matches_itself_in_every_spelling(date):
    iso, words = date.isoformat(), f"{date.day} {date:%B} {date.year:04}"
    assert date_matches(words, iso)
    assert date_matches(iso, words)
    assert date_matches(iso, f"{date.year:04}")
