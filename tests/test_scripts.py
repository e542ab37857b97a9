"""The text of the three scripts: the same where they do the same, so that their diff is the paper."""
import ast
import difflib
import re

import pytest

from conftest import ROOT
from test_runs import METRICS, OWN_METRICS

# Blocks of grpo_baseline.py that another script changes, because its algorithm needs that.
CHANGED = {
    "sgpo": {"Args", "Rollout", "rollout", "update_metrics", "update", "evaluate", "rollout_metrics", "main"},
    "tgpo": {"Args", "update_metrics", "update", "main"},
}
REPLACED = {
    "sgpo": set(),
    "tgpo": {"token_logps", "logps_before_update"},  # token_scores and scores_before_update
}
MOST_REMOVED = {"sgpo": 30, "tgpo": 38}  # lines of grpo_baseline.py, without its header and imports


def source(script: str) -> str:
    return (ROOT / f"{script}.py").read_text()


def blocks(script: str) -> dict[str, str]:
    """Return the text of every function and class of a script, in its order."""
    text = source(script)
    found = {}
    for node in ast.parse(text).body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            found[node.name] = ast.get_source_segment(text, node)
    return found


@pytest.mark.parametrize("script", CHANGED)
def test_shared_blocks_are_word_for_word_the_same(script):
    base = blocks("grpo_baseline")
    ours = blocks(script)
    missing = {name for name in base if name not in ours}
    changed = {name for name in base if ours.get(name, base[name]) != base[name]}
    assert missing == REPLACED[script]
    assert changed == CHANGED[script]


@pytest.mark.parametrize("script", CHANGED)
def test_blocks_stand_in_the_same_order(script):
    base = [name for name in blocks("grpo_baseline") if name not in REPLACED[script]]
    assert [name for name in blocks(script) if name in base] == base


@pytest.mark.parametrize("script", CHANGED)
def test_the_diff_takes_little_away(script):
    base = source("grpo_baseline").partition("# ---------------")[2].splitlines()
    ours = source(script).partition("# ---------------")[2].splitlines()
    diff = list(difflib.unified_diff(base, ours, n=0))[2:]
    removed = [line for line in diff if line.startswith("-")]
    assert len(removed) <= MOST_REMOVED[script], "\n".join(removed)


def test_headers_are_short():
    for script in ("grpo_baseline", *CHANGED):
        docstring = ast.get_docstring(ast.parse(source(script)))
        assert len(docstring.splitlines()) <= 15


def test_the_readme_explains_every_metric():
    readme = (ROOT / "README.md").read_text()
    table = readme.partition("| metric |")[2].partition("\n\n")[0]
    explained = set()
    for row in table.splitlines()[2:]:
        name = row.split("|")[1]
        explained.update(re.findall(r"`([^`]+)`", name))
    if "sgpo/p_guided" not in explained:
        pytest.skip("README has no table with the full names of metrics")
    known = METRICS.union(*OWN_METRICS.values()) - {"step"}
    assert known - explained == set()
    scripts = "".join(source(name) for name in ("common", "grpo_baseline", "sgpo", "tgpo"))
    for name in explained:
        assert f'"{name}"' in scripts
