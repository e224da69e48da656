"""The list of mutations fits the code. Trying them is `python tests/mutations.py`."""

import ast

import pytest
from mutations import HOME, MUTATIONS, Mutation, mutated


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda mutation: mutation.name)
def test_a_mutation_can_be_made_and_names_its_tests(mutation):
    ast.parse(mutated(mutation))
    assert mutation.tests
    for test in mutation.tests.split():
        file, _, rest = test.partition("::")
        found = (HOME / file).read_text()
        assert f"def {rest.partition('[')[0]}" in found


def test_names_are_different():
    assert len({mutation.name for mutation in MUTATIONS}) == len(MUTATIONS) >= 25


@pytest.mark.parametrize("old", ["no such text", "same"])
def test_teeth_a_text_that_is_not_there_once_is_refused(old, tmp_path):
    (tmp_path / "example.py").write_text("same, same")
    with pytest.raises(ValueError, match="Write down what stands there now"):
        mutated(Mutation("example", "example.py", old, "", ""), tmp_path)
