"""Ranks share the questions and give the answers that one process gives; compiled blocks answer eagerly."""

import json
import os
import socket

import pytest
import torch
from ranks import start as start_process
from tiny_recipe import tiny_recipe, write_recipe

from omnidata import Dataset
from omnimodel.blocks import compile_blocks
from pipelines.config import load_recipe
from pipelines.data import model_config
from pipelines.model import build_model
from pipelines.parallel import World, start
from pipelines.prompts import prompts_for
from pipelines.questions import answer_questions, answer_share, by_length, questions_of

CPU = torch.device("cpu")


def opened(recipe, world):
    """Prompts and questions: text only, with one picture, with two."""
    dataset = Dataset(recipe.data.train[0].path, "train")
    config = model_config(recipe.model, dataset)
    model = build_model(recipe, config, world).model
    prompts = prompts_for(model, dataset.tokenizer_dir)
    return prompts, list(questions_of(dataset, prompts, with_text_only=True))


def texts(answers):
    """(key, where in the sample) -> what was said."""
    return {f"{answer.question.key} {len(answer.question.prompt)}": answer.text for answer in answers}


def one_rank(rank, size, port, path, out):
    """Two rounds: as many batches a rank, and one batch less on the last rank."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(size)}
    os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
    recipe = load_recipe(path)
    with start(recipe) as world:
        prompts, questions = opened(recipe, world)
        said = [
            texts(answer_share(prompts, questions[:number], world, batch_size=2)) for number in (8, 5, 1, 0)
        ]
        out.with_name(f"{rank}.json").write_text(json.dumps(said))


@pytest.mark.parametrize("strategy", ["fsdp", pytest.param("ddp", marks=pytest.mark.slow)])
def test_two_ranks_give_the_answers_of_one(tiny_dataset, tmp_path, strategy):
    tree = tiny_recipe(tiny_dataset, tmp_path / "run", parallel={"strategy": strategy})
    path = write_recipe(tmp_path / "r.yaml", tree)
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = probe.getsockname()[1]
    processes = [start_process(one_rank, rank, 2, port, path, tmp_path / "x") for rank in range(2)]
    for process in processes:
        process.join(timeout=100)
    codes = [process.exitcode for process in processes]
    for process in processes:
        process.kill()
    assert codes == [0, 0]
    first, second = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2))
    recipe = load_recipe(path, ["parallel.strategy=single"])
    prompts, questions = opened(recipe, World(0, 1, CPU, "single"))
    assert len({len(question.answer) for question in questions[:8]}) > 1, "some rank must wait for another"
    for number, mine, theirs in zip((8, 5, 1, 0), first, second, strict=True):
        assert not mine.keys() & theirs.keys() and len(mine) - len(theirs) in (0, 1)
        assert mine | theirs == texts(answer_questions(prompts, questions[:number], batch_size=3))


def test_shares_are_of_equal_lengths_and_whole(tiny_dataset, tmp_path):
    recipe = load_recipe(write_recipe(tmp_path / "r.yaml", tiny_recipe(tiny_dataset, tmp_path / "run")))
    prompts, questions = opened(recipe, World(0, 1, CPU, "single"))
    shares = [
        answer_share(prompts, questions[:7], World(rank, 3, CPU, "ddp"), batch_size=2) for rank in range(3)
    ]
    lengths = [[len(answer.question.answer) for answer in share] for share in shares]
    together = [length for turn in zip(*lengths, strict=False) for length in turn]
    assert together == sorted(together, reverse=True)  # at any time all ranks are at answers of one length
    ordered = [len(questions[number].answer) for number in by_length(questions)]
    assert ordered == sorted(ordered, reverse=True) and len(set(ordered)) > 1
    assert sum(map(len, shares)) == 7 and len({key for share in shares for key in texts(share)}) == 7


def test_compiled_blocks_answer_eagerly(tiny_dataset, tmp_path):
    recipe = load_recipe(write_recipe(tmp_path / "r.yaml", tiny_recipe(tiny_dataset, tmp_path / "run")))
    prompts, questions = opened(recipe, World(0, 1, CPU, "single"))
    expected = texts(answer_questions(prompts, questions[:3]))
    compiled = []

    def backend(graph, inputs):
        compiled.append(graph)
        return graph.forward

    compile_blocks(prompts.model, backend=backend)
    assert texts(answer_questions(prompts, questions[:3])) == expected
    assert not compiled
    with torch.no_grad():  # what training calls is compiled as before
        prompts.model(input_ids=torch.from_numpy(questions[0].prompt.astype("int64"))[None][:, :1])
    assert compiled
