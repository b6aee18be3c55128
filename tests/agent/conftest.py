import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parent))  # `repositories`, `models`: helpers, also of children
