D=/work/shared/data
python -m latentlm --threads 1 evaluate zero-shot ../runs/ltm ptb=$D/ptb/ptb.test.txt wikitext=$D/wikitext-2/test.txt lambada=$D/lambada/lambada_test.jsonl ag_news=$D/ag_news/test.csv --limit 300 --json zs-ltm.json > zs-ltm.txt 2>&1
python -m latentlm --threads 1 evaluate zero-shot ../runs/control ptb=$D/ptb/ptb.test.txt wikitext=$D/wikitext-2/test.txt lambada=$D/lambada/lambada_test.jsonl ag_news=$D/ag_news/test.csv --limit 300 --json zs-c.json > zs-c.txt 2>&1
python -m latentlm --threads 1 evaluate calibration ../runs/ltm --data $D/wikitext-2/valid.txt --limit 200 --prompt-tokens 32 --plot cal.png --json cal.json > cal.txt 2>&1
