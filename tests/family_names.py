"""Known without importing the library, for tests to be parametrised by; test_contract compares it with the families."""

FAMILY_NAMES = ("autoregressive", "gp_vae", "gpt_vae", "huggingface", "lang_vae", "ltm")
