"""TRL: what SFTTrainer makes of conversations with assistant_only_loss, on marked templates."""

import logging

from common import RefusedError, main, marked_template, text_only
from jinja2 import TemplateError


def prepare(folder):
    """Answers by a trainer's own preparation of its dataset."""
    import datasets
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM
    from trl import SFTConfig, SFTTrainer

    datasets.disable_progress_bars()
    datasets.disable_caching()
    logging.disable(logging.WARNING)
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    tokenizer.chat_template = marked_template(folder)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **sizes))

    def prepared(record, limit):
        config = SFTConfig(
            "/tmp/maskbench-trl",
            assistant_only_loss=True,
            max_length=limit,
            report_to="none",
            use_cpu=True,
            bf16=False,
        )
        trainer = SFTTrainer(
            model, config, train_dataset=datasets.Dataset.from_list([record]), processing_class=tokenizer
        )
        return trainer.train_dataset

    def answer(question):
        text_only(question)
        if any(not message.get("train", True) for message in question["messages"]):
            raise RefusedError("it has no switch for turns")
        record = {"messages": question["messages"]}
        if question["tools"]:
            record["tools"] = question["tools"]
        try:
            rows = prepared(record, question["max_length"])
        except TemplateError as error:
            raise RefusedError(str(error)) from error
        except RuntimeError as error:
            if "at least one example has no assistant" in str(error):
                raise RefusedError(str(error)) from error
            raise
        if not len(rows):
            raise RefusedError("left out: nothing of it is learned within the limit")
        return rows[0]["input_ids"], rows[0]["labels"]

    return answer


if __name__ == "__main__":
    main(prepare)
