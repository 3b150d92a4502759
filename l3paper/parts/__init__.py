"""What a decoder needs beside L3, and what L3 is compared with."""
