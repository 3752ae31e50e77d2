import json,sys
nb=json.load(open(sys.argv[1])); want=set()
for a in sys.argv[2:]:
    x,y=(a.split('-')+[a])[:2] if '-' in a else (a,a)
    want|=set(range(int(x),int(y)+1))
for i,c in enumerate(nb['cells']):
    if want and i not in want: continue
    print(f'--- {i} {c["cell_type"]} {c["metadata"].get("tags","")}'); print(''.join(c['source']))
    for o in c.get('outputs',[]):
        t=''.join(o.get('text',[])) or ''.join((o.get('data') or {}).get('text/markdown',[]) or (o.get('data') or {}).get('text/plain',[]))
        print('  >>',t[:700].replace('\n','\n  >> '))
