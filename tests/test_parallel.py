"""However many ranks share a step, and however it is cut into microbatches, the numbers stay the same."""

import pytest
import torch
from ranks import run_on_ranks
from safetensors.torch import load_file
from tiny_recipe import MODEL, losses, tiny_recipe, train, write_recipe
from torch.distributed.fsdp import FSDPModule

from omnidata.loader.loader import PackLoader
from omnidata.schema import UserError
from omnimodel import OmniLMMConfig
from pipelines.config import load_recipe, parse_recipe
from pipelines.model import build_model
from pipelines.parallel import World, start
from pipelines.train import train as train_here

# Sums of float32 in another order; the loss is about 5.
LOSS_TOLERANCE = {"rtol": 0, "atol": 3e-6}
WEIGHT_TOLERANCE = {"rtol": 0, "atol": 2e-5}
MAX_TOKENS = 72  # so little that some packs hold text only
RUNS = {
    # name -> (ranks, sections of the recipe)
    "one": (1, {}),
    "fsdp": (2, {"parallel": {"strategy": "fsdp"}}),
    "fsdp-each": (2, {"parallel": {"strategy": "fsdp", "sync_every_microbatch": True}}),
    "ddp": (4, {"parallel": {"strategy": "ddp"}}),
    "hsdp": (4, {"parallel": {"strategy": "hsdp", "shard_size": 2}}),
    "frozen-one": (
        1,
        {"model": {"freeze": ["vision_tower", "language_model"], "train_only_new_tokens": True}},
    ),
    "frozen-fsdp": (
        2,
        {"model": {"freeze": ["vision_tower", "language_model"], "train_only_new_tokens": True}},
    ),
}


def sections(name):
    """The recipe's sections of a run; every run has its model given anew, for merging is one level deep."""
    return {section: dict(values) for section, values in RUNS[name][1].items()}


@pytest.fixture(scope="module")
def runs(tiny_dataset, tmp_path_factory):
    """Every run of the table, trained; name -> run folder."""
    root = tmp_path_factory.mktemp("parallel")
    recipes = {
        name: write_recipe(
            root / f"{name}.yaml",
            tiny_recipe(tiny_dataset, root / name, data={"max_tokens": MAX_TOKENS}, **sections(name)),
        )
        for name in RUNS
    }
    for ranks in (1, 2, 4):
        paths = [recipes[name] for name, (size, _) in RUNS.items() if size == ranks]
        if ranks == 1:
            for path in paths:
                train_here_from(path)
        else:
            run_on_ranks(ranks, paths)
    return {name: root / name for name in RUNS}


def train_here_from(path):
    from pipelines.config import load_recipe

    train_here(load_recipe(path))


def assert_same(runs, name, other):
    torch.testing.assert_close(
        torch.tensor(losses(runs[name])), torch.tensor(losses(runs[other])), **LOSS_TOLERANCE
    )
    mine, theirs = (load_file(runs[run] / "final" / "model.safetensors") for run in (name, other))
    assert mine.keys() == theirs.keys()
    for key in mine:
        if key.endswith("resampler.attn.in_proj_bias"):
            # Softmax cancels a bias of the keys: its gradient is rounding noise, which Adam makes into steps.
            keys = slice(len(mine[key]) // 3, 2 * len(mine[key]) // 3)
            mine[key][keys] = theirs[key][keys]
        torch.testing.assert_close(
            mine[key], theirs[key], **WEIGHT_TOLERANCE, msg=lambda m, key=key: f"{key}: {m}"
        )


@pytest.mark.parametrize("name", ["fsdp", "fsdp-each", "ddp", "hsdp"])
def test_ranks_equal_one_rank(runs, name):
    """ddp and hsdp: 4 ranks x 1 microbatch against 1 rank x 4 accumulated; fsdp: 2 x 2."""
    assert losses(runs["one"])[-1] < losses(runs["one"])[0] - 0.3, "the yardstick must have learnt something"
    assert_same(runs, name, "one")


@pytest.mark.parametrize("ranks", [2, 4])
def test_some_microbatch_had_images_on_one_rank_only(tiny_dataset, ranks):
    """The runs above would not show text-only ranks that hang, if they had none."""
    images = [
        [len(microbatch.images) for microbatch in loader]
        for loader in (
            PackLoader(
                {"path": str(tiny_dataset), "split": "train"},
                **{"global_batch": 4, "max_tokens": MAX_TOKENS, "num_epochs": 3},
                rank=rank,
                world_size=ranks,
            )
            for rank in range(ranks)
        )
    ]
    assert any(0 in together and max(together) > 0 for together in zip(*images, strict=True)), images


def test_frozen_tower_and_new_token_rows_under_fsdp(runs, tiny_dataset):
    assert_same(runs, "frozen-fsdp", "frozen-one")
    start, end = (load_file(runs[name] / "final" / "model.safetensors") for name in ("one", "frozen-fsdp"))
    assert start.keys() == end.keys()


def test_bfloat16_and_torchrun_as_a_user_types_it(tiny_dataset, tmp_path):
    tree = tiny_recipe(
        tiny_dataset, tmp_path / "run", run={"dtype": "bfloat16"}, optim={"steps": 2, "warmup_steps": 1}
    )
    result = train(write_recipe(tmp_path / "r.yaml", tree), "model.freeze=[vision_tower]", ranks=2)
    assert result.returncode == 0, result.stderr
    assert "2 rank(s) x 2 microbatch(es)" in result.stdout
    weights = load_file(tmp_path / "run" / "final" / "model.safetensors")
    assert {tensor.dtype for tensor in weights.values()} == {torch.bfloat16}
    assert all(loss > 0 for loss in losses(tmp_path / "run"))


def test_one_process_computes_bfloat16_as_a_rank_of_many_does(tiny_dataset, tmp_path):
    """No autocast: float32 masters, bfloat16 copies, so that one GPU's numbers are those of any number."""
    for name in ("alone", "rank"):
        tree = tiny_recipe(
            tiny_dataset, tmp_path / name, run={"dtype": "bfloat16"}, optim={"steps": 2, "warmup_steps": 1}
        )
        path = write_recipe(tmp_path / f"{name}.yaml", tree)
        if name == "alone":
            train_here(load_recipe(path))
        else:
            run_on_ranks(1, [path])  # torchrun's environment: strategy auto is fsdp
    assert losses(tmp_path / "alone") == losses(tmp_path / "rank")
    ours, theirs = (load_file(tmp_path / n / "final" / "model.safetensors") for n in ("alone", "rank"))
    for name, tensor in ours.items():
        assert torch.equal(tensor, theirs[name]), name


def test_large_weights_outside_of_blocks_are_units_of_their_own(tiny_dataset, tmp_path):
    recipe = parse_recipe(tiny_recipe(tiny_dataset, tmp_path, run={"dtype": "bfloat16"}))
    with start(recipe) as world:
        assert world.strategy == "fsdp" and world.size == 1
        model = build_model(recipe, OmniLMMConfig(**MODEL, vocab_size=99), world).model
        assert isinstance(model.model.embed_tokens, FSDPModule) and isinstance(model.lm_head, FSDPModule)
        assert {p.dtype for p in model.parameters()} == {torch.float32}


def test_random_weights_are_drawn_on_the_device(tiny_dataset, tmp_path):
    """On a GPU in a moment. Here the device is one without memory: the CPU has drawn nothing."""
    recipe = parse_recipe(tiny_recipe(tiny_dataset, tmp_path))
    model = build_model(
        recipe, OmniLMMConfig(**MODEL, vocab_size=99), World(0, 1, torch.device("meta"), "single")
    ).model
    assert {p.device.type for p in (*model.parameters(), *model.buffers())} == {"meta"}
    drawn = torch.get_rng_state()
    torch.manual_seed(recipe.run.seed)
    assert torch.equal(torch.get_rng_state(), drawn)


def test_deterministic_reaches_torch(tiny_dataset, tmp_path):
    recipe = parse_recipe(tiny_recipe(tiny_dataset, tmp_path, run={"deterministic": True}))
    try:
        with start(recipe):
            assert torch.are_deterministic_algorithms_enabled()
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize(
    ("section", "expected"),
    [
        ({"parallel": {"strategy": "ddp"}}, "needs torchrun"),
        ({"run": {"device": "cuda"}}, "torch sees no GPU"),
    ],
)
def test_impossible_worlds_are_refused(tiny_dataset, tmp_path, section, expected):
    if "cuda" in str(section) and torch.cuda.is_available():
        pytest.skip("there is a GPU")
    recipe = parse_recipe(tiny_recipe(tiny_dataset, tmp_path, **section))
    with pytest.raises(UserError, match=expected), start(recipe):
        pass
