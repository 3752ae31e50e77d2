# bash /work/pause.sh STOP|CONT : all processes of the two measurements
for f in /work/mtres/pid /work/s2res/pid; do p=$(cat $f); s=$(ps -o sid= -p $p 2>/dev/null | tr -d ' '); [ -n "$s" ] && pkill -$1 -s $s; done; true
