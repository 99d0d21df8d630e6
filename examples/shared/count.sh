#!/bin/sh
# Counts the words of each text in a folder, says how far it is, and that it is done.
cd "$1" || exit 1
set -- *.txt
total=$#
number=0
: > words.csv
for text in "$@"; do
  date > alive
  echo "$text,$(wc -w < "$text")" >> words.csv
  number=$((number + 1))
  echo "$number $total" | awk '{ print $1 / $2 }' > fraction
done
# First line: the exit code. Second: whether people are to be told. Then a message.
printf '0\n1\n%s texts counted\n' "$total" > done.part
mv done.part done  # as a whole, or not at all
