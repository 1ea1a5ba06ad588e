"""axolotl: its chat_template strategy (`type: chat_template`) on the tokenizer's own template."""

from common import RefusedError, main, text_only
from jinja2 import TemplateError


def prepare(folder):
    """Answers by the strategy that axolotl's datasets are tokenized with."""
    from axolotl.prompt_strategies.chat_template import ChatTemplatePrompter, ChatTemplateStrategy
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    strategies = {}

    def answer(question):
        text_only(question)
        limit = question["max_length"] or 2048
        if limit not in strategies:
            prompter = ChatTemplatePrompter(
                tokenizer,
                chat_template=tokenizer.chat_template,
                max_length=limit,
                message_field_training="train",
            )
            strategies[limit] = ChatTemplateStrategy(
                prompter,
                tokenizer=tokenizer,
                train_on_inputs=False,
                sequence_len=limit,
                roles_to_train=["assistant"],
                train_on_eos="turn",
            )
        record = {"messages": question["messages"]}
        if question["tools"]:
            record["tools"] = question["tools"]
        try:
            out = strategies[limit].tokenize_prompt(record)
        except TemplateError as error:
            raise RefusedError(str(error)) from error
        return out["input_ids"][:limit], out["labels"][:limit]

    return answer


if __name__ == "__main__":
    main(prepare)
