"""Where candidates are evaluated; the contract is Pool and Job in evaluation/base.py."""
