"""This project: omnidata's renderer, on the record as a chat JSONL holds it."""

from common import RefusedError, main

from omnidata.conversation import to_conversation
from omnidata.render import Renderer
from omnidata.schema import Record, RejectError
from omnidata.text.tokenizer import load_tokenizer


def prepare(folder):
    """Answers by the builder's own steps."""
    tokenizer = load_tokenizer(folder)
    if not {"<im_patch>", "<im_start>", "<im_end>"} <= set(tokenizer.get_vocab()):
        tokenizer.add_special_tokens({"additional_special_tokens": ["<im_patch>", "<im_start>", "<im_end>"]})
    renderer = Renderer(tokenizer, num_query=2, default_system=None)

    def answer(question):
        renderer.max_length = question["max_length"]
        record = {"id": "x", "messages": question["messages"]}
        if question["num_images"]:
            record["images"] = [f"{i}.jpg" for i in range(question["num_images"])]
        if question["tools"]:
            record["tools"] = question["tools"]
        try:
            rendered = renderer.render(to_conversation(Record("x", "line 1", "x", record)))
        except RejectError as error:
            raise RefusedError(f"{error.reason}: {error.detail}") from error
        return rendered.input_ids, rendered.labels

    return answer


if __name__ == "__main__":
    main(prepare)
