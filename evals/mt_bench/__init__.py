"""MT-Bench: 80 questions of two turns, rated from 1 to 10 by a judge, after FastChat's protocol.

Questions, reference answers and official judge prompts are read from the user's folder; none of them is part of
megagpt.

Source: Zheng et al. 2023, "Judging LLM-as-a-judge with MT-Bench and Chatbot Arena"; lm-sys/FastChat,
fastchat/llm_judge.
"""
