"""Continue a prompt: python run.py [--max-tokens N] [--chat] PROMPT. Needs the packages of requirements.txt."""

import argparse
import sys
from pathlib import Path

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE / "python"))

import llmc  # noqa: E402  (the copy beside this file)
from llmc.errors import LlmcError  # noqa: E402


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("prompt")
    parser.add_argument("--max-tokens", type=int, default=64)
    parser.add_argument("--chat", action="store_true", help="the prompt is a message, answered by the model's chat template")
    args = parser.parse_args()
    prompt = [{"role": "user", "content": args.prompt}] if args.chat else args.prompt
    try:
        with llmc.load(HERE / "model") as model:
            for event in model.generate(prompt, max_tokens=args.max_tokens, stream=True):
                print(event.text, end="", flush=True)
    except LlmcError as error:
        print(f"run.py: error: {error}", file=sys.stderr)
        return error.exit_code
    print()
    return 0


if __name__ == "__main__":
    sys.exit(main())
