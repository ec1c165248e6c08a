"""An error of the user's is told in the names of whoever it is told to."""

import pickle

import msgspec

from jaxserve.errors import InputError, Name
from jaxserve.server.core.messages import FromCore, Refused

SAID = "min_tokens=5 is more than max_tokens=3; lower it"
ERROR = InputError(Name("min_tokens"), "=5 is more than ", Name("max_tokens"), "=3; lower it")


def test_a_sentence_that_begins_with_a_name_is_about_it() -> None:
    assert str(ERROR) == SAID
    assert ERROR.field == "min_tokens"
    assert InputError("min_tokens is wrong").field is None
    assert InputError(Name("the prompt"), " is empty", field="prompt").field == "prompt"


def test_names_are_replaced_and_nothing_else() -> None:
    assert ERROR.told({"max_tokens": "max_output_tokens"}) == SAID.replace("max_tokens", "max_output_tokens")
    given = InputError(Name("stop"), f" holds {'max_tokens=3 {stop}'!r}; give others")
    assert given.told({"stop": "stop_sequences", "max_tokens": "x"}) == (
        "stop_sequences holds 'max_tokens=3 {stop}'; give others"
    )


def test_it_comes_through_pickle_and_from_the_core_as_it_was() -> None:
    sent = msgspec.msgpack.encode(Refused(["a"], [*ERROR.parts], ERROR.field))
    refused = msgspec.msgpack.decode(sent, type=FromCore)
    for copy in (pickle.loads(pickle.dumps(ERROR)), InputError(*refused.parts, field=refused.field)):
        assert (str(copy), copy.parts, copy.field) == (SAID, ERROR.parts, "min_tokens")
