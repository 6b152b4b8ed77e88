"""What the model answers to fixed prompts while it learns."""

from rwkv_train.config.finetune import FinetuneConfig
from rwkv_train.data.instruct.conversation import Message
from rwkv_train.data.instruct.templates import ChatTemplate
from rwkv_train.generation.generate import generate
from rwkv_train.generation.sampling import SamplingSettings
from rwkv_train.models.lm import LanguageModel
from rwkv_train.parallel.processes import Processes
from rwkv_train.tokenizers import Tokenizer
from rwkv_train.training.validation import SAMPLES_FILE, Answer

_GREEDY = SamplingSettings(temperature=0.0)


class Answerer:
    """Lets the model answer the prompts of the settings, greedily.

    Args:
        tokenizer: the model's.
        config: the settings of the run.
        processes: the processes of the run; all generate, the first one writes.

    Raises:
        DataError: the template cannot write a prompt.
    """

    def __init__(self, tokenizer: Tokenizer, config: FinetuneConfig, processes: Processes) -> None:
        self._tokenizer = tokenizer
        self._settings = config.trainer
        self._processes = processes
        self._prompts = config.prompts
        template = ChatTemplate(config.data.template)
        self._texts = [template.prompt([Message("user", prompt)]) for prompt in config.prompts]
        self._stop = template.turn_end() if config.prompts else ""

    def write(self, model: LanguageModel, step: int) -> tuple[Answer, ...]:
        """Return the answers, and add them to the file of samples.

        Raises:
            OSError: the file cannot be written.
        """
        answers = []
        for prompt, text in zip(self._prompts, self._texts, strict=True):
            pieces = generate(
                model,
                self._tokenizer,
                text,
                _GREEDY,
                max_tokens=self._settings.sample_tokens,
                seed=self._settings.seed,
                stop=[self._stop] if self._stop else [],
            )
            answers.append(Answer(prompt, "".join(pieces).strip()))
        if answers and self._processes.is_first:
            with (self._settings.run_folder / SAMPLES_FILE).open("a", encoding="utf-8") as file:
                file.write(f"--- step {step}\n")
                for prompt, answer in answers:
                    file.write(f"> {prompt}\n{answer}\n")
        return tuple(answers)
