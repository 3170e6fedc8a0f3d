"""The cases are openings of Wikipedia articles (CC BY-SA 4.0), shortened."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gristmill.corpus.sentences import first_sentence

CASES = [
    "Ieoh Ming Pei was a Chinese-American architect. | He was born in Guangzhou.",
    "I. M. Pei was a Chinese-American architect. | He was born in Guangzhou.",
    "J. R. R. Tolkien was an English writer. | He was the author of The Hobbit.",
    "Harry S. Truman was the 33rd president of the United States. | As the 34th vice president, he followed.",
    "St. Louis is an independent city in the U.S. state of Missouri. | It lies near the confluence.",
    "Jack St. Clair Kilby was an American electrical engineer. | For this invention, Kilby shared a prize.",
    "Looney Tunes is a franchise owned by Warner Bros. Entertainment. | The franchise began as a series.",
    "Washington, D.C., officially the District of Columbia, is the capital. | The city lies on the Potomac.",
    "The Fund is headquartered in Washington, D.C. | It consists of 191 member countries.",
    "The Space Shuttle was operated from 1981 to 2011 by the U.S. National Aeronautics Administration. | Its name was.",
    "Jesus was crucified in Jerusalem c. AD 30–33. | His followers proclaimed that he was risen.",
    "Inferno is a poem by Dante, begun c. 1308 and completed c. 1321. | It is the first part.",
    "Carpentry is a craft of cutting and shaping ships, timber bridges, etc. | Carpenters worked with natural wood.",
    "Boxing is a combat sport and martial art. | Taking place in a ring, it involves two people.",
    "Mount Fuji has a summit elevation of 3,776.24 m. | It is the highest mountain in Japan.",
    "K2, at 8,611 metres (28,251 ft) above sea level, is second to Everest (29,032 ft). | It lies in Asia.",
    'A sentence is an expression, such as "The fox jumps over the lazy dog". | In traditional grammar, it is.',
    'Fountain was a urinal signed "R. Mutt". | The work is regarded as a landmark.',
    "The painting recalls the Revolution of 1830 that toppled King Charles X. | A bare-breasted woman leads.",
    "A function assigns to each element of X exactly one element of Y. | The set X is called the domain.",
    "It detonated over two cities during the final days of World War II. | The aerial bombings killed many.",
    "Martin Luther King Jr. was an American civil rights activist. | He advanced civil rights.",
    "The Permian ended 251.902 Ma and the Triassic 201.4 Ma. | The Triassic Period is the first.",
    "Who's Afraid of Virginia Woolf? is a play by Edward Albee. | It examines a marriage.",
    "Sgt. Pepper's Lonely Hearts Club Band is the eighth album by the Beatles. | Released in May, it led.",
    "Carbon dioxide has the chemical formula CO2. | It is made up of molecules.",
    'The slogan "Workers of the world, unite!" comes from the Manifesto. | The phrase was used widely.',
    "Easter marks the crucifixion (see also Good Friday. Matthew 27 tells of it) at Calvary c. 30 AD. | It ends Lent.",
    "The Symphony No. 5 in C minor, Op. 67, is by Beethoven. | It was first performed in 1808.",
    "Is there life on Mars? | Scientists disagree.",
    "Brown is the color of wood, i.e. a dark orange, e.g. of chestnuts. | In Europe it is disliked.",
    '"Johnny B. Goode" is a song by Chuck Berry. | Released as a single in 1958, it was a hit.',
    "He said he was done (he was not.) | The end came later.",
    "An unclosed (bracket does not swallow the text. | The next sentence is apart.",
    "The Prophet Muhammad died in A.D. 632 in Medina. | He was buried there.",
    "水是一种无机化合物。|水无色无味。",
]


@pytest.mark.parametrize("case", CASES)
def test_ends_where_a_reader_would_end(case):
    first, rest = case.split("|")
    assert first_sentence(first + rest.removeprefix(" ")) == first.strip()
    assert first_sentence(first.strip()) == first.strip()


def test_a_sentence_runs_over_line_breaks_but_not_over_paragraphs():
    assert first_sentence("Won the Award\nand the Prize. \nThe story is set.") == "Won the Award and the Prize."
    assert (
        first_sentence("Euler's identity is the equality\n\nwhere e is a number.") == "Euler's identity is the equality"
    )
    assert first_sentence("  \n") == ""


@given(st.text(alphabet="aB. !?()\"'\n。U1"))
def test_is_a_beginning_of_the_text(text):
    assert " ".join(text.split()).startswith(first_sentence(text))
