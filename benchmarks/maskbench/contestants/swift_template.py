"""ms-swift: its own template of each family, in training mode."""

import json
import logging
import shutil
import tempfile
from pathlib import Path

from common import RefusedError, main, text_only

NAMES = {
    **{"qwen": "qwen2_5", "llama3": "llama3", "gemma": "gemma"},
    **{"mistral": "mistral_nemo", "zephyr": "zephyr"},
}
CONFIG = {  # it loads a tokenizer from a model's folder only
    **{"model_type": "llama", "architectures": ["LlamaForCausalLM"], "dtype": "float32"},
    **{"vocab_size": 152000, "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1},
    "max_position_embeddings": 4096,
}


def prepare(folder):
    """Answers by Template.encode, with the settings of `swift sft`."""
    from swift.model import get_processor
    from swift.template import get_template

    logging.disable(logging.WARNING)
    copy = shutil.copytree(folder, Path(tempfile.mkdtemp()) / folder.name)
    (copy / "config.json").write_text(json.dumps(CONFIG))
    processor = get_processor(str(copy), model_type="gemma")
    templates = {}

    def answer(question):
        text_only(question)
        limit = question["max_length"] or 2048
        if limit not in templates:
            made = get_template(
                processor,
                default_system="",
                template_type=NAMES[folder.name],
                max_length=limit,
                truncation_strategy="right",
            )
            made.set_mode("train")
            templates[limit] = made
        if any("reasoning_content" in message for message in question["messages"]):
            raise RefusedError("it reads no reasoning beside the content")
        messages = []
        for message in question["messages"]:
            calls = message.get("tool_calls", ())
            if message["content"] or not calls:
                switch = {} if message.get("train", True) else {"loss": False}
                messages.append({"role": message["role"], "content": message["content"], **switch})
            messages += [{"role": "tool_call", "content": json.dumps(call["function"])} for call in calls]
        record = {"messages": messages}
        if question["tools"]:
            record["tools"] = [json.dumps(tool) for tool in question["tools"]]
        try:
            out = templates[limit].encode(record)
        except ValueError as error:
            if "agent_template" in str(error):
                raise RefusedError(str(error)) from error
            raise
        return out["input_ids"], out["labels"]

    return answer


if __name__ == "__main__":
    main(prepare)
