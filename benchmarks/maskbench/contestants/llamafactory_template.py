"""LLaMA-Factory: its own template of each family, through the processor of `stage: sft`."""

import json
import logging
from types import SimpleNamespace

from common import NotRunError, RefusedError, main, text_only

NAMES = {"qwen": "qwen3_nothink"}  # the others have the names of the folders


def prepare(folder):
    """Answers by the steps of its dataset: align a record of messages, then encode it."""
    from llamafactory.data.converter import SharegptDatasetConverter
    from llamafactory.data.parser import DatasetAttr
    from llamafactory.data.processor import SupervisedDatasetProcessor
    from llamafactory.data.template import get_template_and_fix_tokenizer
    from llamafactory.hparams import DataArguments
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    arguments = DataArguments(template=NAMES.get(folder.name, folder.name), cutoff_len=2048)
    template = get_template_and_fix_tokenizer(tokenizer, arguments)
    attributes = DatasetAttr("file", "maskbench", formatting="sharegpt", messages="messages", tools="tools")
    attributes.role_tag, attributes.content_tag = "role", "content"
    attributes.user_tag, attributes.assistant_tag, attributes.system_tag = "user", "assistant", "system"
    attributes.observation_tag, attributes.function_tag = "tool", "function_call"
    converter = SharegptDatasetConverter(attributes, SimpleNamespace(media_dir=""))
    logging.disable(logging.WARNING)

    def answer(question):
        text_only(question)
        if any(not message.get("train", True) for message in question["messages"]):
            raise RefusedError("it has no switch for turns")
        if any("reasoning_content" in message for message in question["messages"]):
            raise RefusedError("it reads no reasoning beside the content")
        if any("tool_calls" in message for message in question["messages"]):
            raise NotRunError("its format of tool calls is another one")
        record = {"messages": question["messages"]}
        record["tools"] = json.dumps(question["tools"]) if question["tools"] else ""
        row = converter(record)
        if len(row["_prompt"]) % 2 != 1 or len(row["_response"]) != 1:
            raise RefusedError("dropped as an invalid example")
        arguments.cutoff_len = question["max_length"] or 2048
        processor = SupervisedDatasetProcessor(template, tokenizer, None, arguments)
        out = processor.preprocess_dataset({name: [value] for name, value in row.items()})
        return out["input_ids"][0], out["labels"][0]

    return answer


if __name__ == "__main__":
    main(prepare)
