"""transformers: apply_chat_template with return_assistant_tokens_mask, on marked templates."""

from common import RefusedError, main, marked_template, text_only
from jinja2 import TemplateError


def prepare(folder):
    """Answers by the tokenizer's own method."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    tokenizer.chat_template = marked_template(folder)

    def answer(question):
        text_only(question)
        if any(not message.get("train", True) for message in question["messages"]):
            raise RefusedError("it has no switch for turns")
        limit = {"truncation": True, "max_length": question["max_length"]} if question["max_length"] else {}
        try:
            encoded = tokenizer.apply_chat_template(
                question["messages"], tools=question["tools"], return_dict=True,
                return_assistant_tokens_mask=True, **limit,
            )  # fmt: skip
        except TemplateError as error:
            raise RefusedError(str(error)) from error
        ids, mask = encoded["input_ids"], encoded["assistant_masks"]
        return ids, [token if learn else -100 for token, learn in zip(ids, mask, strict=True)]

    return answer


if __name__ == "__main__":
    main(prepare)
