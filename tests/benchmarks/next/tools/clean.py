"""clean.py SRC DST: drop rows of rates that the whole search did not choose."""
import json,sys,collections
from statistics import fmean
src,dst=sys.argv[1:]
d=json.load(open(src))
rows=d['rows']
SOME=("full","head-only","bitfit","lora")
seen=collections.defaultdict(lambda: collections.defaultdict(dict))
for r in rows:
    if r['part']=='rates': seen[r['strategy'],r['count']][r['rate']][r['seed']]=r['validation']
best={}
for k,rates in seen.items():
    two=k[0] in SOME
    m={rate:fmean([v[s] for s in ((100,101) if two else (100,))]) for rate,v in rates.items() if not two or len(v)==2}
    best[k]=max(m,key=lambda x:(m[x],x))
    srt=sorted(m); i=srt.index(best[k])
    print(k,best[k],'inside' if 0<i<len(srt)-1 else 'EDGE',{f"{x:g}":round(m[x],4) for x in srt})
keep=[]
for r in rows:
    k=(r['strategy'],r['count'])
    if r['part']!='rates' and r['rate']!=best.get(k): continue
    if r['part']=='rates' and k[0] not in SOME and r['seed']!=100: continue
    keep.append(r)
acc=collections.Counter((r['strategy'],r['count']) for r in keep if r['part']=='accuracy')
final=[r for r in keep if acc.get((r['strategy'],r['count']))]
print(len(rows),len(keep),len(final)); print({k:v for k,v in acc.items() if v!=5})
d['rows']=final
json.dump(d,open(dst,'w'),indent=1)
open(dst,'a').write("\n")
