"""Where `squeeze` writes is checked before its work: neither model nor text is read."""

import pytest

from sparse_attn.__main__ import main


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("build", "."), "^file: got the folder ., expected a file"),
        (("run", "x", "--figure", "k.xyz"), "^--figure: got k.xyz, expected a name that ends in"),
        (("run", "x", "--figure", "no/k.png"), "^--figure: no folder .*no"),
    ],
)
def test_where_to_write(arguments, message):
    pytest.importorskip("transformers")
    pytest.importorskip("matplotlib")
    with pytest.raises(SystemExit, match=message):
        main(["squeeze", *arguments])
